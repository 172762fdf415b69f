"""A single model on disk: the .onnx file, and its weights beside it or in the bundle."""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from ddit.exporter.single.check import check_single, why_unchecked
from ddit.exporter.single.defaults import Defaults
from ddit.exporter.single.model import single_model
from ddit.runtime.bundle import Bundle
from ddit.runtime.errors import ModelError, UsageError
from ddit.runtime.folders import flush, new_folder

ALIGNMENT = 4096  # bytes: a tensor begins at a multiple, so that a program can map it into its memory

Weights = Literal["copy", "bundle"]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Written:
    """What was written, and what the check found."""

    files: dict[str, int]  # bytes by path
    pixels: int | None  # the largest difference to the runtime's pictures, of 255; None: not checked
    unchecked: str = ""  # why


def write_single(
    bundle: Bundle, out: Path, defaults: Defaults, *, backend: str, weights: Weights, check: bool, report: Report
) -> Written:
    """Write a bundle's single model; all of it appears at the end, or nothing.

    Raises `UsageError` for a place where it cannot lie and for a bundle of which none can be made, `ModelError` where
    it cannot be written, `ParityError` where its pictures are not the runtime's.
    """
    data = out.with_name(out.name + ".data")
    for path in (out, data) if weights == "copy" else (out,):
        if os.path.lexists(path):
            raise UsageError(f"{path} exists; choose another name, or delete it first")
    folder, source = (Path(os.path.realpath(path)) for path in (out.parent, bundle.path))
    if folder.is_relative_to(source):
        raise UsageError(f"{out} lies in the bundle, which only exports write into; choose another place")
    if weights == "bundle" and not source.is_relative_to(folder):
        raise UsageError(
            f"ONNX Runtime reads weights below the model's own folder only: put {out.name} into {source.parent}, "
            "where the bundle lies, or leave --weights bundle out"
        )
    with bundle.unchanged():
        for graph in bundle.manifest.graphs.values():
            bundle.verify_small(graph.on(backend).file)
        model = single_model(bundle, defaults, backend)
        try:
            with new_folder(out) as partial:
                made = partial / out.name
                if weights == "copy":
                    _check_space(model, folder)
                    report(f"writing {data}")
                    ir.save(model, made, external_data=data.name, alignment=ALIGNMENT, align_threshold=0)
                else:
                    _point_into(model, folder, source)
                    ir.save(model, made)
                reason = why_unchecked(bundle) if check else "--no-check"
                pixels = None
                if not reason:
                    report(f"checking {out.name} against the runtime")
                    place = partial if weights == "copy" else folder
                    pixels = check_single(bundle, made, place, bundle.manifest.dtype)
                flush(partial)
                for path in sorted(partial.iterdir(), key=lambda path: path.name == out.name):  # the model last
                    path.rename(out.parent / path.name)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ModelError(
                    f"no space left on the disk of {out.parent}; free some, or use --weights bundle"
                ) from None
            raise ModelError(f"{out} cannot be written: {error.strerror or error}") from None
    files = {str(path): path.stat().st_size for path in (out, data) if path.exists()}
    return Written(files, pixels, reason)


def _check_space(model: ir.Model, folder: Path) -> None:
    """Raise `ModelError` where the disk lacks the space for a copy of the weights."""
    size = sum(one.const_value.nbytes for one in model.graph.initializers.values() if one.const_value is not None)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ModelError(
            f"not enough disk space in {folder}: the weights need {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "--weights bundle copies none"
        )


def _point_into(model: ir.Model, folder: Path, bundle: Path) -> None:
    """Let the weights' places be relative to ``folder``."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                (bundle / tensor.location).relative_to(folder).as_posix(),
                offset=tensor.offset,
                length=tensor.length,
                dtype=tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
                base_dir=folder,
            )
