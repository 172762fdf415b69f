"""Writing clips: MP4 through PyAV, GIF and WebP through Pillow, or every frame as a picture."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from ddit.runtime.errors import DditError, UsageError
from ddit.runtime.files import with_ending

CLIPS = {".mp4", ".gif", ".webp"}
CODEC = "libx264"  # what every player and browser knows
QUALITY = "17"  # its constant rate factor, at which losses are hard to see


def check_clip_type(path: Path) -> None:
    """Raise `UsageError` for a file type that `save_clip` does not write here."""
    if path.suffix.lower() not in CLIPS:
        known = ", ".join(sorted(CLIPS))
        raise UsageError(
            f"{path} cannot hold a clip; name it {with_ending(path, '.mp4')} ({known}), or give a name with %d for "
            "pictures of all frames, as in frames/%03d.png"
        )
    if path.suffix.lower() == ".mp4":
        _import_av()


def save_clip(frames: Sequence[Image.Image], path: Path, frames_per_second: float) -> None:
    """Write frames of one size. Raises `UsageError` for what the format cannot hold."""
    if path.suffix.lower() == ".mp4":
        _save_mp4(frames, path, frames_per_second)
        return
    first, *others = frames
    duration = round(1000 / frames_per_second)  # milliseconds; GIF has hundredths of a second
    quality: dict[str, Any] = {"quality": 90} if path.suffix.lower() == ".webp" else {}
    try:
        first.save(path, save_all=True, append_images=others, duration=duration, loop=0, **quality)
    except ValueError as error:  # both have a largest size
        raise UsageError(f"{path.suffix} cannot hold the clip: {error}; choose --out with .mp4") from None


def frame_files(pattern: Path, count: int) -> list[Path]:
    """The files of so many frames: ``frames/%03d.png`` → frames/000.png, frames/001.png, …

    Raises `UsageError` for a pattern that does not give every frame a name.
    """
    try:
        names = [pattern.name % number for number in range(count)]
    except (TypeError, ValueError):
        names = []
    if len(set(names)) != count:
        raise UsageError(f"{pattern} has no place for the frames' numbers; give one %d, as in frames/%03d.png")
    return [pattern.with_name(name) for name in names]


def _save_mp4(frames: Sequence[Image.Image], path: Path, frames_per_second: float) -> None:
    av = _import_av()
    try:
        with av.open(str(path), "w") as container:
            stream = container.add_stream(CODEC, rate=Fraction(frames_per_second).limit_denominator(1000))
            stream.width, stream.height = frames[0].size
            stream.pix_fmt, stream.options = "yuv420p", {"crf": QUALITY}
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())
    except av.error.FFmpegError as error:
        raise DditError(f"{path} cannot be written: {error}") from None


def _import_av() -> Any:
    try:
        import av
    except ImportError:
        raise UsageError(
            "writing .mp4 needs PyAV; install it with: pip install 'ddit[video]', or choose --out with .webp or .gif"
        ) from None
    return av
