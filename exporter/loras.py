"""User LoRAs: low-rank changes of a base model (arXiv 2106.09685), merged into its weights before an export.

diffusers reads the files of all trainers (peft's, kohya's, XLabs', BFL's) and gives them one set of names. What follows
is W ← W + scale · α/r · B·A, tensor by tensor, into a folder that is like the pipeline's own: every level of an export
shares those weights.
"""

import inspect
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ddit.exporter.graphs.weights import SafetensorsFolder, Weight, WeightFiles
from ddit.exporter.models import Source
from ddit.runtime.console import printable
from ddit.runtime.errors import ModelError, UsageError


@dataclass(frozen=True)
class Lora:
    """A file and how strongly it counts."""

    path: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Lora":
        """``"style.safetensors:0.8"``, or without a scale, which is 1 then. Raises `UsageError`."""
        name, colon, number = text.rpartition(":")
        try:
            lora = cls(Path(name), float(number)) if colon and not Path(text).exists() else cls(Path(text))
        except ValueError:
            lora = cls(Path(text))
        if not math.isfinite(lora.scale):
            raise UsageError(f"{text}: the scale of a LoRA is a number, as in style.safetensors:0.8")
        if lora.path.suffix != ".safetensors" or not lora.path.is_file():
            raise UsageError(f"{lora.path} is no .safetensors file; name a LoRA's file, and :SCALE after it if need be")
        return lora

    def __str__(self) -> str:
        return printable(self.path.name) + (f":{self.scale:g}" if self.scale != 1 else "")


@dataclass(frozen=True)
class Change:
    """What one LoRA adds to one weight: ``factor`` · ``up`` · ``down``."""

    down: Tensor  # A, (r, in)
    up: Tensor  # B, (out, r)
    factor: float  # scale · α/r


Changes = Mapping[str, Mapping[str, Sequence[Change]]]  # by component of the pipeline and name of its weight


@contextmanager
def with_loras(source: Source, loras: Sequence[Lora], place: Path) -> Iterator[Source]:
    """The pipeline with LoRAs merged into it, in a folder inside ``place`` that goes when the block ends.

    Only the components that a LoRA changes are written; the others are links. Raises `ModelError` for a LoRA that does
    not fit.
    """
    if not loras:
        yield source
        return
    with TemporaryDirectory(dir=place, prefix=".ddit-lora-") as name:
        folder = Path(name)
        changes = read_changes(source.folder, loras)
        for path in source.folder.iterdir():
            if path.name in changes:
                merge_component(path, folder / path.name, changes[path.name])
            else:
                (folder / path.name).symlink_to(path.resolve())
        merged = f"{source.info.id} with {', '.join(map(str, loras))}"
        yield replace(source, folder=folder, info=source.info.model_copy(update={"id": merged}))


def read_changes(pipeline: Path, loras: Sequence[Lora]) -> Changes:
    """What LoRAs add to the weights of a pipeline's components. Raises `ModelError`."""
    changes: defaultdict[str, defaultdict[str, list[Change]]] = defaultdict(lambda: defaultdict(list))
    for lora in loras:
        tensors, alphas, metadata = _read(pipeline, lora)
        for name in sorted(tensors):
            layer, part, end = name.rpartition(".lora_A.weight")
            if name.endswith(".lora_B.weight") and f"{name.removesuffix('.lora_B.weight')}.lora_A.weight" in tensors:
                continue
            if not part or end or f"{layer}.lora_B.weight" not in tensors:
                raise ModelError(
                    f"{lora.path} has {name!r}, which is more than a LoRA of linear layers; it cannot be merged"
                )
            component, _, path = layer.partition(".")
            down, up = tensors[name], tensors[f"{layer}.lora_B.weight"]
            alpha = _alpha(layer, alphas, metadata, rank=len(down))
            factor = lora.scale * alpha / len(down)
            changes[component][f"{path}.weight"].append(Change(down, up, factor))
        if not tensors:
            raise ModelError(f"{lora.path} has no LoRA of this model")
    return changes


def merge_component(source: Path, target: Path, changes: Mapping[str, Sequence[Change]]) -> None:
    """Write a component's folder with changed weights, one tensor in memory at a time. Raises `ModelError`."""
    stored = SafetensorsFolder(source)
    stored.require(changes)
    target.mkdir()
    for path in source.iterdir():
        if path.suffix == ".json" and not path.name.endswith(".index.json"):
            (target / path.name).symlink_to(path.resolve())
    # without the shard's number and a variant's name: what diffusers and transformers look for
    file = min(source.glob("*.safetensors")).stem.partition("-")[0].partition(".")[0] + ".safetensors"
    weights = WeightFiles(target)
    for name in stored:
        dtype, shape = stored.kind(name)
        value = partial(_merged, stored, name, changes.get(name, ()))
        weights.add(file, name, Weight(dtype, shape, transposed=False, value=value))
    weights.write()


def _merged(stored: SafetensorsFolder, name: str, changes: Sequence[Change]) -> Tensor:
    """A weight with its changes; the sum is float32."""
    value = stored[name]
    if not changes:
        return value
    total = value.float()
    for change in changes:
        product = change.up.float() @ change.down.float()
        if product.shape != total.shape:
            raise ModelError(f"a LoRA changes {name!r} of shape {tuple(total.shape)} by {tuple(product.shape)}")
        total = total + change.factor * product
    return total


def _read(pipeline: Path, lora: Lora) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """A file's tensors by diffusers' names, its α by name, and its metadata. Raises `ModelError`."""
    import diffusers

    index = json.loads((pipeline / "model_index.json").read_text(encoding="utf-8"))
    kind: Any = getattr(diffusers, str(index.get("_class_name")), None)
    if not hasattr(kind, "lora_state_dict"):
        raise ModelError(f"diffusers reads no LoRA for {index.get('_class_name')}")
    takes_alphas = "return_alphas" in inspect.signature(kind.lora_state_dict).parameters
    options = {"return_alphas": True} if takes_alphas else {}
    try:
        with safe_open(lora.path, framework="pt") as file:
            if any("dora_scale" in name or "magnitude" in name for name in file.keys()):  # noqa: SIM118 (no mapping)
                raise ModelError(f"{lora.path} is a DoRA, which changes more than a product; it cannot be merged")
        found = kind.lora_state_dict(str(lora.path), return_lora_metadata=True, local_files_only=True, **options)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"{lora.path} cannot be read as a LoRA: {str(error).strip().splitlines()[0]}") from None
    tensors, *alphas, metadata = found
    return dict(tensors), dict(alphas[0] or {}) if alphas else {}, dict(metadata or {})


def _alpha(layer: str, alphas: Mapping[str, Any], metadata: Mapping[str, Any], *, rank: int) -> float:
    """A layer's α. Where a file says nothing it is the rank, so that B·A counts as it is."""
    component, _, path = layer.partition(".")
    if metadata.get(f"{component}.use_rslora") or metadata.get(f"{component}.use_dora"):
        raise ModelError("a LoRA with rank-stabilised scaling or DoRA cannot be merged; merge it with peft")
    for name in (f"{layer}.alpha", f"{layer}.lora_A.alpha"):
        if name in alphas:
            return float(alphas[name])
    pattern = metadata.get(f"{component}.alpha_pattern") or {}
    return float(pattern.get(path, metadata.get(f"{component}.lora_alpha", rank)))
