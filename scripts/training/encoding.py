"""Prompts and pictures, encoded once: training needs their embeddings and latents, but not the encoders.

Rows are kept in files of 256, each named by a hash of its inputs. An interrupted run loses at most one file's work, and
inputs that change are encoded again.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddit.exporter.families.base import Family
from ddit.runtime.errors import DditError, UsageError
from ddit.runtime.files import whole
from training.loop import Training

FILE_ROWS = 256
CALL_ROWS = {"text": 32, "pictures": 4}  # encoded together: pictures of a megapixel take gigabytes in the VAE
ON_DEVICE = 4 * 2**30  # bytes; larger tables stay in their files, which are memory-mapped
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}

Item = TypeVar("Item")
Encode = Callable[[Sequence[Item]], dict[str, Tensor]]


class Rows:
    """Rows of named tensors: on the device where they are few, else in their files."""

    def __init__(self, parts: Sequence[Mapping[str, Tensor]], device: torch.device):
        """``parts``: the rows, in order; all parts but the last have the same number."""
        self.parts, self.device = parts, device
        counts = [len(next(iter(part.values()))) for part in parts]
        self.part_rows, self.count = counts[0], sum(counts)
        self.on_device = sum(tensor.nbytes for part in parts for tensor in part.values()) <= ON_DEVICE
        if self.on_device:
            self.parts = [{name: torch.cat([part[name] for part in parts]).to(device) for name in parts[0]}]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: Tensor) -> dict[str, Tensor]:
        """The rows of these numbers (B,), stacked, on the device."""
        if self.on_device:
            return {name: tensor[rows] for name, tensor in self.parts[0].items()}
        places = [divmod(row, self.part_rows) for row in rows.tolist()]
        return {
            name: torch.stack([self.parts[part][name][row] for part, row in places]).to(self.device)
            for name in self.parts[0]
        }


def encode_once(
    run: Training, folder: Path, what: str, identity: str, items: Sequence[Item], load: Callable[[], Encode[Item]]
) -> Rows:
    """A row of every item: from the files of ``folder``, or encoded into them; processes share the work.

    Args:
        what: ``text`` or ``pictures``, the files' first word.
        identity: everything else that the rows depend on, as the model and its precision.
        items: items with the same ``repr`` are taken for the same.
        load: loads the encoder; called only where rows are missing. The encoder is freed afterwards.
    """
    groups = [items[start : start + FILE_ROWS] for start in range(0, len(items), FILE_ROWS)]
    files = []
    for group in groups:
        digest = hashlib.sha256(repr((identity, *group)).encode()).hexdigest()
        files.append(folder / f"{what}-{digest[:16]}.safetensors")
    mine = list(zip(groups, files, strict=True))[run.rank :: run.world]
    missing = [(group, file) for group, file in mine if not file.is_file()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        _encode(run, what, missing, load())
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    run.accelerator.wait_for_everyone()
    return Rows([load_file(file) for file in files], run.device)


@torch.no_grad()
def _encode(run: Training, what: str, jobs: Sequence[tuple[Sequence[Item], Path]], encode: Encode[Item]) -> None:
    for number, (group, file) in enumerate(jobs):
        run.say(f"encoding {what}: file {number + 1} of {len(jobs)}")
        rows = CALL_ROWS[what]
        parts = [encode(group[start : start + rows]) for start in range(0, len(group), rows)]
        with whole(file) as part:
            save_file({name: torch.cat([p[name].cpu() for p in parts]).contiguous() for name in parts[0]}, part)


@dataclass(frozen=True)
class Picture:
    """A picture's file and its caption."""

    path: Path
    modified: int
    caption: str = field(repr=False)


def find_pictures(folder: Path) -> list[Picture]:
    """A folder's pictures with their captions, ``name.txt`` beside ``name.png``. Raises `UsageError`."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give one with pictures, as in images:FOLDER")
    paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURES]
    if not paths:
        raise UsageError(f"{folder} holds no pictures ({', '.join(sorted(PICTURES))})")
    pictures = []
    for path in paths:
        try:
            caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise UsageError(
                f"{path} has no caption; write it into {path.with_suffix('.txt').name} beside it"
            ) from None
        pictures.append(Picture(path, path.stat().st_mtime_ns, caption))
    return pictures


def picture_encoder(family: Family, height: int, width: int, device: torch.device) -> Encode[Picture]:
    """Pictures → ``latent`` (B, C, …) float32, scaled as the transformer knows it."""
    encode_pixels = family.picture_encoder(device)

    def encode(pictures: Sequence[Picture]) -> dict[str, Tensor]:
        pixels = torch.stack([read_picture(picture.path, height, width) for picture in pictures])
        return {"latent": encode_pixels(pixels)}

    return encode


def read_picture(path: Path, height: int, width: int) -> Tensor:
    """A picture, resized and cut around its centre: ``(3, height, width)`` in [-1, 1]."""
    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    except OSError as error:
        raise DditError(f"{path} is not a picture that can be read: {error}") from None
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1).float() / 127.5 - 1
