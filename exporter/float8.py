"""FP8 twins of a bundle's levels: written into the bundle beside the others, and compared with them."""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ddit.exporter.graphs.float8 import Rounded, contents, find_weights, layout, use_float8
from ddit.exporter.graphs.rewrite import BACKEND as TWIN
from ddit.exporter.graphs.stored import Stored, write_tensors
from ddit.runtime import shapes
from ddit.runtime.backends.base import Array
from ddit.runtime.backends.building import Progress
from ddit.runtime.backends.onnxruntime.host import CPU, FLOAT8, engine_errors, import_onnxruntime, open_session
from ddit.runtime.bundle import Bundle, file_info, read_manifest
from ddit.runtime.bundle.manifest import GraphInfo, ParityResult
from ddit.runtime.bundle.names import FP8, FP8_SCALE, GUIDANCE, TABLES, TIMESTEP
from ddit.runtime.errors import ModelError, ParityError, UsageError
from ddit.runtime.files import PARTIAL, whole
from ddit.runtime.folders import locked
from ddit.runtime.tools.verify import FP8_TOLERANCE, load_references, relative_error

Report = Callable[[str], None]
Phase = Callable[[str, int, int], None]  # told a phase's name, steps done and their number
Cases = Sequence[tuple[dict[str, int], Mapping[str, Array]]]  # sizes and inputs

WEIGHTS = f"{FLOAT8}.safetensors"  # of all levels
CHECKED = f"against the {TWIN} twin"  # what `ParityResult` says of them
DTYPES = {"F8_E4M3": ir.DataType.UINT8, "F32": ir.DataType.FLOAT}  # in the graphs, by safetensors' names


def add_float8(bundle: Bundle, report: Report, progress: Progress) -> tuple[ParityResult, ...]:
    """Write every level's FP8 twin and their weights into a bundle, and return how far each is from its other twin.

    The manifest names them when all are there and right; until then a bundle is what it was. One weight at a time is
    in memory, whatever the size of the model. Raises `UsageError` for a bundle without twins or without large products,
    for one in bfloat16, and while another process does the same; `ParityError` where a level's error is above
    `FP8_TOLERANCE`; `ModelError` where the disk is too small.
    """
    manifest, folder = bundle.manifest, bundle.path
    graphs = {level.graph: manifest.graphs[level.graph] for level in manifest.levels}
    if without := [name for name, info in graphs.items() if TWIN not in info.twins]:
        raise UsageError(
            f"{without[0]} has no twin for the {TWIN} backend to start from; export {folder} again, at opset 23"
        )
    if half := [name for name, info in graphs.items() if info.dtype == "bf16"]:
        raise UsageError(
            f"{half[0]} is in bfloat16, which ONNX Runtime cannot run on the CPU to check FP8; export {folder} again "
            "with --dtype fp16"
        )
    for info in graphs.values():
        bundle.verify_small(info.twins[TWIN])
    models = {name: ir.load(bundle.file(info.twins[TWIN])) for name, info in graphs.items()}
    weights = find_weights([*models.values()], set.intersection(*(set(info.weights) for info in graphs.values())))
    if not weights:
        raise UsageError(f"{folder} has no products that are large enough for FP8; the {TWIN} backend is as fast")
    tensors = layout(weights)
    size = sum(tensor.nbytes for tensor in tensors.values())
    twins = {name: f"{Path(info.file).stem}.{FLOAT8}.onnx" for name, info in graphs.items()}
    with _only_writer(bundle, next(iter(graphs.values())).twins[TWIN], [WEIGHTS, *twins.values()]):
        _check_space(folder, size)
        report(f"writing {len(weights)} weights in FP8, {size / 1e9:.1f} GB")
        with progress("FP8") as at, whole(folder / WEIGHTS) as path:
            begins = write_tensors(path, tensors, contents(_counted(weights.values(), at)))
        stored = {name: _external(folder, name, tensor, begins[name]) for name, tensor in tensors.items()}
        rounded = {name: Rounded(stored[name + FP8], stored[name + FP8_SCALE]) for name in weights}
        for name, model in models.items():
            use_float8(model, rounded)
            with whole(folder / twins[name]) as path:
                ir.save(model, path)
        results: list[ParityResult] = []
        for name, info in graphs.items():
            report(f"comparing {name} with its {TWIN} twin, on the CPU")
            with progress("comparing") as at:
                results += _compare(bundle, name, info, twins[name], at)
        report("hashing")
        added = {file: file_info(folder / file) for file in (WEIGHTS, *twins.values())}
        bundle.keep(
            lambda current: {
                "graphs": current.graphs | {name: _with_twin(current.graphs[name], twins[name]) for name in twins},
                "parity": (*(one for one in current.parity if one.twin != FLOAT8), *results),
                "files": current.files | added,
            }
        )
    return tuple(results)


def _counted(weights: Collection[ir.ExternalTensor], at: Phase) -> Iterator[ir.ExternalTensor]:
    for done, weight in enumerate(weights):
        at("weights", done, len(weights))
        yield weight


def _with_twin(info: GraphInfo, file: str) -> GraphInfo:
    more = {"twins": {**info.twins, FLOAT8: file}, "twin_weights": {**info.twin_weights, FLOAT8: (WEIGHTS,)}}
    return info.model_copy(update=more)


def _external(folder: Path, name: str, tensor: Stored, begin: int) -> ir.ExternalTensor:
    dtype = DTYPES[tensor.dtype]
    return ir.ExternalTensor(
        WEIGHTS, begin, tensor.nbytes, dtype, shape=ir.Shape(tensor.shape), name=name, base_dir=folder
    )


@contextmanager
def _only_writer(bundle: Bundle, twin: str, files: Sequence[str]) -> Iterator[None]:
    """Write files in the block: when it fails they are removed, and before it what a killed process left of them.

    Raises `UsageError` where another process is in such a block.
    """
    # the lock of a twin, because `Bundle.keep` takes the folder's, and so do calibrations, which need not wait
    with locked(bundle.file(twin), wait=False) as free:
        if not free:
            raise UsageError(f"another process is writing the FP8 twins of {bundle.path}; wait for its end")
        _remove_unlisted(bundle.path, files)
        try:
            yield
        except BaseException:
            _remove_unlisted(bundle.path, files)
            raise


def _remove_unlisted(folder: Path, files: Sequence[str]) -> None:
    """Remove those of the files that the manifest does not name, whole or half written."""
    listed = read_manifest(folder).files
    for file in files:
        for path in (folder / file, *folder.glob(f".{Path(file).stem}{PARTIAL}*")):
            if path.name not in listed:
                with suppress(OSError):
                    path.unlink()


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ModelError(
            f"not enough disk space in {folder}: FP8 needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        )


def _compare(bundle: Bundle, graph: str, info: GraphInfo, file: str, at: Phase) -> list[ParityResult]:
    """A level's FP8 twin on the CPU, by its functions' bodies, against the twin that it was made of."""
    cases = _cases(bundle, graph, info)
    expected, outputs = (_outputs(bundle.file(one), cases, at) for one in (info.twins[TWIN], file))
    results = []
    for case, ((sizes, _), wanted, found) in enumerate(zip(cases, expected, outputs, strict=True)):
        for spec in info.outputs:
            error = relative_error(found[spec.name], wanted[spec.name])
            result = ParityResult(
                graph=graph, tensor=spec.name, case=case, sizes=sizes, error=error, tolerance=FP8_TOLERANCE,
                checked=CHECKED, twin=FLOAT8,
            )  # fmt: skip
            if not error < FP8_TOLERANCE:
                raise ParityError(
                    f"{graph} in FP8 is off by {error:.1e} in {spec.name}, allowed is {FP8_TOLERANCE:g}; "
                    f"this model needs the {TWIN} backend"
                )
            results.append(result)
    return results


def _outputs(path: Path, cases: Cases, at: Phase) -> list[dict[str, NDArray[np.float32]]]:
    """What a graph gives for every case.

    Its session holds no weights of its own: they are mapped, and made float32 when a product needs them.
    """
    session = open_session(path, CPU, fold=False)
    outputs = []
    for done, (_, inputs) in enumerate(cases):
        at(path.stem, done, len(cases))
        with engine_errors(f"run {path.name}"):
            outputs.append(_run(session, inputs))
    return outputs


def _run(session: Any, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
    """Run a session so that Ctrl-C ends it after a node: a run of a large model takes minutes."""
    options = import_onnxruntime().RunOptions()
    with ThreadPoolExecutor(1) as pool:  # a thread that is inside ONNX Runtime hears of no Ctrl-C
        run = pool.submit(session.run, None, dict(inputs), options)
        try:
            values = run.result()
        except KeyboardInterrupt:
            options.terminate = True
            raise
    # copies, because ONNX Runtime's arrays keep all memory of their session
    return {output.name: value.copy() for output, value in zip(session.get_outputs(), values, strict=True)}


def _cases(bundle: Bundle, graph: str, info: GraphInfo) -> Cases:
    """Inputs with their sizes: those that the exporter kept of this level, or else random ones at the smallest size."""
    manifest = bundle.manifest
    sizes = {one.case: one.sizes for one in manifest.parity if one.graph == graph and one.twin is None}
    kept = [
        (sizes.get(case, {}), {spec.name: arrays[f"input/{spec.name}"] for spec in info.inputs})
        for (name, case), arrays in sorted(load_references(bundle).items())
        if name == graph
    ]
    if kept:
        return kept
    symbols = shapes.to_symbols(manifest.latent, manifest.profile.entry[0].at("minimum"))
    random = np.random.default_rng(0)
    return [(symbols, {spec.name: _random(spec.name, spec.resolve(symbols), random) for spec in info.inputs})]


def _random(name: str, shape: tuple[int, ...], random: np.random.Generator) -> NDArray[np.float32]:
    if name in TABLES:
        turn = np.cos if name == TABLES[0] else np.sin
        return turn(random.uniform(-np.pi, np.pi, shape)).astype(np.float32)
    if name in (TIMESTEP, GUIDANCE):
        return np.full(shape, 0.5 if name == TIMESTEP else 3.5, np.float32)
    return random.standard_normal(shape, np.float32)
