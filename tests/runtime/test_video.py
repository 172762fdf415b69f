"""Clips on disk: read again with PyAV and Pillow."""

import av
import numpy as np
import pytest
from PIL import Image

from ddit.runtime.errors import UsageError
from ddit.runtime.video import check_clip_type, frame_files, save_clip


@pytest.fixture(scope="module")
def frames():
    """A bright square that moves over a grey gradient."""
    pictures = []
    for number in range(9):
        pixels = np.tile(np.linspace(60, 120, 64, dtype=np.uint8)[None, :, None], (48, 1, 3))
        pixels[16:32, 4 * number : 4 * number + 16] = (230, 40, 40)
        pictures.append(Image.fromarray(pixels))
    return pictures


def test_mp4_holds_every_frame_at_its_time(frames, tmp_path):
    save_clip(frames, tmp_path / "clip.mp4", 16)
    with av.open(tmp_path / "clip.mp4") as container:
        (stream,) = container.streams.video
        assert (stream.codec.name, stream.average_rate) == ("h264", 16)
        read = [(frame.time, frame.to_image()) for frame in container.decode(stream)]
    np.testing.assert_allclose([time for time, _ in read], np.arange(9) / 16, atol=1e-6)
    for frame, (_, picture) in zip(frames, read, strict=True):
        assert np.abs(np.asarray(frame, int) - np.asarray(picture, int)).mean() < 4


@pytest.mark.parametrize(("suffix", "milliseconds"), [(".gif", 60), (".webp", 62)])
def test_animated_pictures_hold_every_frame(frames, tmp_path, suffix, milliseconds):
    path = tmp_path / f"clip{suffix}"
    save_clip(frames, path, 16)
    with Image.open(path) as clip:
        assert clip.n_frames == 9
        for number, frame in enumerate(frames):
            clip.seek(number)
            assert np.abs(np.asarray(frame, int) - np.asarray(clip.convert("RGB"), int)).mean() < 4
            assert abs(clip.info["duration"] - milliseconds) <= 3


def test_names_of_frames(tmp_path):
    assert [path.name for path in frame_files(tmp_path / "%03d.png", 3)] == ["000.png", "001.png", "002.png"]
    for name in ("100%.png", "%s-%s.png", "clip%%.png"):
        with pytest.raises(UsageError, match="no place for the frames' numbers"):
            frame_files(tmp_path / name, 3)


def test_other_types_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"name it .*clip\.mp4"):
        check_clip_type(tmp_path / "clip.avi")
