"""Check a bundle on the machine that will run it: files, graphs, and the exporter's reference values."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddit.runtime.backends.base import Backend
from ddit.runtime.backends.registry import kind_of
from ddit.runtime.bundle.manifest import Dtype
from ddit.runtime.errors import BundleError, UsageError

log = logging.getLogger(__name__)

REFERENCE_FILE = "parity.safetensors"

# relative L2 error allowed between a graph and the original model, by the graph's arithmetic
TOLERANCES: dict[Dtype, float] = {"fp32": 1e-5, "fp16": 2e-2, "bf16": 2e-2}


def reference_name(graph: str, case: int, direction: str, tensor: str) -> str:
    """Name of a reference array in ``parity.safetensors``; ``direction`` is ``input`` or ``output``."""
    return f"{graph}/{case}/{direction}/{tensor}"


def relative_error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """‖actual − expected‖₂ / ‖expected‖₂ in float64; infinite where a value is not finite or a shape differs."""
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    difference = float(np.linalg.norm(actual.astype(np.float64) - expected))
    return difference / max(float(np.linalg.norm(expected.astype(np.float64))), 1e-30)


def tolerance(graph: str, dtype: Dtype, shape: Sequence[int]) -> float:
    """The relative error allowed in an output of this shape.

    More in float32 pictures of over 256×256 pixels: ONNX Runtime's CPU provider adds up the values of a group norm one
    after another, and its error grows faster than their number. A group norm of 32 groups of 4 channels differs from
    float64 by 1.8e-6 at 256×256, 1.5e-5 at 512×512 and 1.1e-4 at 1024×1024 (1.32; torch: 5e-8), a graph of thirty of
    them by 2.0e-5 at 512×512.
    """
    if graph == "vae_decoder" and dtype == "fp32":
        return TOLERANCES[dtype] * float(max(1.0, shape[-2] * shape[-1] / 256**2) ** 1.5)
    return TOLERANCES[dtype]


@dataclass(frozen=True)
class Check:
    """One reproduced reference value."""

    graph: str
    case: int
    tensor: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error < self.tolerance


def verify_graphs(backend: Backend) -> Iterator[Check]:
    """Run every graph on the exporter's inputs and compare with the original model's outputs.

    Accelerators compute float32 products in TF32, so that on a backend that is not `exact_float32` every graph is held
    to the tolerance of half precision. Inputs of a size that the backend's engines were not built for are left out.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    manifest, exact = backend.bundle.manifest, kind_of(backend.name).exact_float32
    try:
        arrays = load_file(backend.bundle.file(REFERENCE_FILE))
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{backend.bundle.file(REFERENCE_FILE)} cannot be read: {error}; export it again") from None
    cases = sorted({tuple(name.split("/")[:2]) for name in arrays})
    for graph, case in cases:
        prefix = f"{graph}/{case}/"
        inputs = {
            name.removeprefix(prefix + "input/"): value
            for name, value in arrays.items()
            if name.startswith(prefix + "input/")
        }
        try:
            outputs = backend.engine(graph).run(inputs)
        except UsageError as error:  # engines may have been built for fewer sizes than the bundle was exported for
            log.info("%s, case %s: %s", graph, case, error)
            continue
        dtype: Dtype = manifest.graphs[graph].dtype if exact else "fp16"
        for name, expected in arrays.items():
            if name.startswith(prefix + "output/"):
                tensor = name.removeprefix(prefix + "output/")
                found, allowed = relative_error(outputs[tensor], expected), tolerance(graph, dtype, expected.shape)
                yield Check(graph, int(case), tensor, found, allowed)
