"""Check a bundle on the machine that will run it: files, graphs, and the exporter's reference values."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddit.runtime.backends.artifacts import FOLDER as ENGINES
from ddit.runtime.backends.base import Array, Backend
from ddit.runtime.backends.registry import kind_of
from ddit.runtime.bundle import MANIFEST, Bundle
from ddit.runtime.bundle.manifest import Dtype, GraphInfo
from ddit.runtime.conditioning.text import Tokenizer
from ddit.runtime.errors import BundleError, UsageError

log = logging.getLogger(__name__)

REFERENCE_FILE = "parity.safetensors"

# relative L2 error allowed between a graph and the original model, by the graph's arithmetic
TOLERANCES: dict[Dtype, float] = {"fp32": 1e-5, "fp16": 2e-2, "bf16": 2e-2}
FP8_TOLERANCE = 0.1  # the same of a level whose products are in FP8


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


def check_names(bundle: Bundle) -> list[str]:
    """The names of files in the bundle's folder that its manifest does not list, engines aside.

    Raises `BundleError` where the manifest uses a file that it does not list: nothing could tell whether it is damaged.
    """
    manifest = bundle.manifest
    used = {name for graph in manifest.graphs.values() for name in graph.all_files}
    used |= {encoder.tokenizer.file for encoder in manifest.encoders} | {REFERENCE_FILE}
    if missing := sorted(used - manifest.files.keys()):
        raise BundleError(f"{bundle.path} is damaged: its manifest gives no hash of {missing[0]}; export it again")
    found = {path.relative_to(bundle.path) for path in bundle.path.rglob("*") if not path.is_dir()}
    inside = {path.as_posix() for path in found if path.parts[0] != ENGINES}
    return sorted(inside - manifest.files.keys() - {MANIFEST})


def check_tokenizers(bundle: Bundle) -> None:
    """Load every tokenizer and use it. Raises `BundleError`."""
    for encoder in bundle.manifest.encoders:
        info = encoder.tokenizer
        Tokenizer(bundle.file(info.file), info)("a red circle")


def load_references(bundle: Bundle) -> dict[tuple[str, int], dict[str, Array]]:
    """The exporter's inputs and the original model's outputs, by graph and case; arrays as ``input/x``, ``output/y``.

    Raises `BundleError` unless every graph was compared with the original, and every comparison that the manifest
    calls full can be repeated.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path, manifest = bundle.file(REFERENCE_FILE), bundle.manifest
    try:
        with bundle.unchanged():
            arrays = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}; export it again") from None
    references: defaultdict[tuple[str, int], dict[str, Array]] = defaultdict(dict)
    for name, values in arrays.items():
        graph, _, rest = name.partition("/")
        case, _, array = rest.partition("/")
        if graph not in manifest.graphs or not case.isdecimal() or array not in _arrays_of(manifest.graphs[graph]):
            raise BundleError(f"{path} has values of no graph, {name!r}; export it again")
        references[graph, int(case)][array] = values
    full = {(result.graph, result.case) for result in manifest.parity if result.checked == "full"}
    for graph, info in manifest.graphs.items():
        if graph not in {result.graph for result in manifest.parity}:
            raise BundleError(f"{bundle.path} is damaged: {graph} was never compared with the model; export it again")
        cases = {case for name, case in full | references.keys() if name == graph}
        for case in sorted(cases):
            if missing := sorted(_arrays_of(info) - references[graph, case].keys()):
                raise BundleError(f"{path} lacks {graph}/{case}/{missing[0]}; export it again")
    return dict(references)


def _arrays_of(graph: GraphInfo) -> set[str]:
    """The names of a graph's arrays in a case of the references."""
    return {f"input/{spec.name}" for spec in graph.inputs} | {f"output/{spec.name}" for spec in graph.outputs}


def verify_graphs(backend: Backend) -> Iterator[Check]:
    """Run every graph on the exporter's inputs and compare with the original model's outputs.

    Accelerators compute float32 products in TF32, so that on a backend that is not `exact_float32` every graph is held
    to the tolerance of half precision, and levels whose products are in FP8 to that of FP8. Inputs of a size that the
    backend's engines were not built for are left out.
    Raises `BundleError` as `load_references` does.
    """
    manifest, exact = backend.bundle.manifest, kind_of(backend.name).exact_float32
    in_float8 = {level.graph for level in manifest.levels} if kind_of(backend.name).float8 else set()
    for (graph, case), arrays in sorted(load_references(backend.bundle).items()):
        info = manifest.graphs[graph]
        try:
            outputs = backend.engine(graph).run({spec.name: arrays[f"input/{spec.name}"] for spec in info.inputs})
        except UsageError as error:  # engines may have been built for fewer sizes than the bundle was exported for
            log.info("%s, case %s: %s", graph, case, error)
            continue
        dtype: Dtype = info.dtype if exact else "fp16"
        for spec in info.outputs:
            expected = np.asarray(arrays[f"output/{spec.name}"], dtype=np.float32)
            found = relative_error(outputs[spec.name], expected)
            allowed = FP8_TOLERANCE if graph in in_float8 else tolerance(graph, dtype, expected.shape)
            yield Check(graph, case, spec.name, found, allowed)
