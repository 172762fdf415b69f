"""Writing pictures and clips to files, whole or not at all."""

from pathlib import Path

from PIL import Image

from ddit.runtime.decoding import Frames
from ddit.runtime.errors import UsageError
from ddit.runtime.files import whole
from ddit.runtime.video import save_clip

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}  # which every Pillow writes as they are


def save_frames(frames: Frames, path: Path, frames_per_second: float | None) -> None:
    """Write a clip, or without ``frames_per_second`` a picture. Raises `UsageError` for what the format cannot hold."""
    with whole(path) as part:
        if frames_per_second is None:
            save_picture(frames[0], part)
        else:
            save_clip(frames, part, frames_per_second)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture. Raises `UsageError` for one that the format cannot hold."""
    try:
        picture.save(path)
    except ValueError as error:  # WebP and JPEG have a largest size
        raise UsageError(f"{path.suffix} cannot hold the picture: {error}; choose --out with .png") from None
