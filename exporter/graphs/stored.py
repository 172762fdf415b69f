"""Writing a safetensors file tensor by tensor: none of them has to be in memory before its turn."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ALIGNMENT = 4096  # bytes: where the first tensor begins is a multiple, so that a memory-mapped file is aligned


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its type by safetensors' name, its shape, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def write_tensors(path: Path, tensors: Mapping[str, Stored], contents: Iterable[bytes]) -> dict[str, int]:
    """Write tensors by name and their ``contents`` in the same order. Returns where in the file each begins."""
    header: dict[str, object] = {}
    begins: dict[str, int] = {}
    end = 0
    for name, tensor in tensors.items():
        begins[name], end = end, end + tensor.nbytes
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)  # the format allows a header to end in spaces
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for content in contents:
            out.write(content)
    return {name: 8 + len(text) + begin for name, begin in begins.items()}
