"""Clips from C++: two passes, UniPC and Euler, growing latents, the decoder frame by frame, as the Python runtime's."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cpp.conftest import PROMPT, SEED, Run, write_inputs
from ddit.runtime import Pipeline

SIZE = (9, 64, 128)
SCHEDULES = (
    "native",
    "fixed:8x3,4x3,2x6",
    "dynamic:tau=0.5,warmup=3,hold=2",
    "dynamic:tau=1,hold=2+adaptive:0.5",
    "adaptive:tolerance=0.3,order=2",
    "taylorseer:interval=3,order=2",
    "teacache:0.4",
)


def compare(host: Run, bundle: Path, folder: Path, schedule: str, *options: object, size=SIZE, **asked) -> None:
    """The host's latent, decisions and frames are those of the Python runtime."""
    frames, height, width = size
    expected = Pipeline.open(bundle, backend="cpu")(
        PROMPT, seed=SEED, steps=12, schedule=schedule, frames=frames, height=height, width=width, **asked
    )
    inputs = write_inputs(bundle, folder, height, width, frames)
    outputs = ("--out", folder / "%02d.png", "--latent-out", folder / "o.npy", "--trace", folder / "o.json")
    done = host(bundle, *inputs, *outputs, "--steps", 12, "--schedule", schedule, *options)
    assert done.returncode == 0, (schedule, done.stderr)
    trace = json.loads((folder / "o.json").read_text())["steps"]
    assert [step["level"] for step in trace] == expected.trace.levels, schedule
    for found, wanted in zip(trace, expected.trace.steps, strict=True):
        assert {int(patch): value for patch, value in found["statistic"].items()} == pytest.approx(
            wanted.statistic, rel=1e-3
        )
        assert found["figures"] == pytest.approx(wanted.figures, rel=1e-3)
    np.testing.assert_allclose(np.load(folder / "o.npy")[0], expected.latent, atol=1e-3)
    files = sorted(folder.glob("*.png"))
    assert len(files) == len(expected.frames) == frames
    for file, frame in zip(files, expected.frames, strict=True):
        assert np.abs(np.asarray(Image.open(file), int) - np.asarray(frame)).max() <= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_same_clip_with_unipc(wan_bundle, host, tmp_path, schedule):
    compare(host, wan_bundle, tmp_path, schedule)


def test_a_clip_grows(wan_bundle, host, tmp_path):
    compare(host, wan_bundle, tmp_path, "progressive:delta=0.5+adaptive:0.2", size=(5, 128, 128))
    compare(host, wan_bundle, tmp_path, "progressive:adaptive,delta=0.5", size=(5, 128, 128))


def test_same_clip_with_euler(wan_euler_bundle, host, tmp_path):
    compare(host, wan_euler_bundle, tmp_path, "native", size=(5, 64, 64))


def test_one_pass_and_one_frame(wan_bundle, host, tmp_path):
    compare(host, wan_bundle, tmp_path, "native", "--guidance", 1, size=(1, 64, 64), guidance=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--frames", 10), "10 frames cannot be made: the latent has one for the first frame and one for every 4 more; "
                           "nearest: 9 or 13"),
        (("--frames", 0), "the number of frames must be at least 1"),
        (("--frames", 401), "401 frames of 64×64 pixels with 16 text tokens are outside the bundle's profile"),
        (("--out", "clip.png"), "clip.png has no place for the frames' numbers; give one %d, as in frames/%03d.png"),
        (("--out", "%s.png"), "%s.png has no place for the frames' numbers"),
        (("--out", "%d%d.png"), "%d%d.png has no place for the frames' numbers"),
    ],
)  # fmt: skip
def test_errors_are_one_line(wan_bundle, host, tmp_path, options, message):
    inputs = write_inputs(wan_bundle, tmp_path, 64, 64, 5)
    done = host(wan_bundle, *inputs, "--steps", 2, "--out", tmp_path / "%d.png", *options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr
    assert not list(tmp_path.glob("*.png"))


def test_a_guided_clip_needs_the_negative_prompt_s_ids(wan_bundle, host, tmp_path):
    ids, _, *rest = write_inputs(wan_bundle, tmp_path, 64, 64, 5)
    del rest[:2]
    done = host(wan_bundle, ids, tmp_path / "ids.json", *rest[0:], "--out", tmp_path / "%d.png")
    assert done.returncode == 2
    assert "guidance above 1 needs the token ids of a negative prompt" in done.stderr


def test_frames_appear_all_or_none(wan_bundle, host, tmp_path):
    inputs = write_inputs(wan_bundle, tmp_path, 64, 64, 5)
    (tmp_path / ".3.png.partial").mkdir()
    (tmp_path / ".3.png.partial" / "full").touch()
    done = host(wan_bundle, *inputs, "--steps", 1, "--schedule", "native", "--out", tmp_path / "%d.png")
    assert (done.returncode, done.stderr) == (1, f"error: {tmp_path / '3.png'} cannot be written\n")
    assert not list(tmp_path.glob("*.png"))
    assert [path.name for path in tmp_path.glob(".*")] == [".3.png.partial"]
