"""A bundle's weight files: every tensor once, in safetensors, and ONNX graphs that point into them.

Values are read, converted and written one tensor at a time, so that a model of tens of gigabytes passes through a few
hundred megabytes of memory.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddit.exporter.graphs.stored import Stored, write_tensors
from ddit.runtime.errors import ModelError

SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
IR_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
}


@dataclass(frozen=True)
class Weight:
    """A tensor to be written: its dtype and shape in the file, and how to get its value."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    transposed: bool  # the file holds the transpose of the value
    value: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def blob(self) -> bytes:
        """The bytes in the file."""
        value = self.value().detach()
        value = (value.T if self.transposed else value).to(self.dtype).contiguous()
        if tuple(value.shape) != self.shape:
            raise ModelError(
                f"a weight has shape {tuple(value.shape)} in the model's files, {self.shape} in its config"
            )
        return value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


class WeightFiles:
    """Collects what every graph needs, writes the files, and then tells where each tensor lies."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, dict[str, Weight]] = {}
        self._offsets: dict[str, dict[str, int]] = {}

    def add(self, file: str, name: str, weight: Weight) -> str:
        """Register a tensor and return its name in the file; a name that is registered already is stored once."""
        key = f"{name}.T" if weight.transposed else name
        self._files.setdefault(file, {}).setdefault(key, weight)
        return key

    def write(self) -> None:
        """Write every file. Raises `ModelError` beforehand where the disk lacks the space."""
        free = shutil.disk_usage(self.folder).free
        if self.total_bytes() > free:
            raise ModelError(
                f"not enough disk space in {self.folder.parent}: the weights need {self.total_bytes() / 1e9:.1f} GB, "
                f"{free / 1e9:.1f} GB are free"
            )
        for file, weights in self._files.items():
            tensors = {
                name: Stored(SAFETENSORS_NAMES[weight.dtype], weight.shape, weight.nbytes)
                for name, weight in weights.items()
            }
            self._offsets[file] = write_tensors(
                self.folder / file, tensors, (weight.blob() for weight in weights.values())
            )

    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(self.file_bytes, self._files))

    def file_bytes(self, file: str) -> int:
        """Bytes of one file's tensors."""
        return sum(weight.nbytes for weight in self._files[file].values())

    def external_tensor(self, file: str, key: str) -> ir.ExternalTensor:
        """The tensor as ONNX external data, after `write`."""
        weight = self._files[file][key]
        return ir.ExternalTensor(
            file,
            offset=self._offsets[file][key],
            length=weight.nbytes,
            dtype=IR_DTYPES[weight.dtype],
            shape=ir.Shape(weight.shape),
            name=key,
            base_dir=self.folder,
        )


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a diffusers or transformers component's folder, whatever its shards; read when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder} has no .safetensors files; ddit reads no other format")
        variants = {file for file in files if file.stem.split("-")[0].endswith((".fp16", ".bf16"))}
        # a folder may hold the same weights in full and in half precision: take the full ones
        self._file_of: dict[str, Path] = {}
        for file in [file for file in files if file not in variants] or sorted(variants):
            self._file_of.update(dict.fromkeys(_names(file), file))

    def require(self, names: Iterable[str]) -> None:
        """Raise `ModelError` unless every name is there."""
        if missing := sorted(set(names) - self._file_of.keys()):
            raise ModelError(f"{self.folder} has no tensor {missing[0]!r}; is the download complete?")

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """A tensor's type and shape, without its values. Raises `ModelError` for a type that bundles do not have."""
        known = {stored: dtype for dtype, stored in SAFETENSORS_NAMES.items()}
        with safe_open(self._file_of[name], framework="pt") as file:
            view = file.get_slice(name)
            if view.get_dtype() not in known:
                raise ModelError(f"{self.folder} has {name!r} as {view.get_dtype()}, which ddit does not read")
            return known[view.get_dtype()], tuple(view.get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}; download it again") from None
