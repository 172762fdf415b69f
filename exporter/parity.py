"""The parity gate: every exported graph against the original model, before a bundle is accepted.

The original runs on seeded inputs at two sizes of the profile, neither of them the traced one, the second not square.
It computes in float32 from weights rounded to the graph's type, so that what is measured is the graph's own error.
Inputs and the original's outputs are kept in the bundle (``parity.safetensors``), so that ``ddit-run verify`` can
repeat the comparison on any machine and backend, without torch. `ddit.exporter.end_to_end` then checks the graphs
together.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from ddit.exporter.families.base import REDUCED_DEPTH, Family
from ddit.exporter.graphs.job import GraphJob
from ddit.exporter.graphs.rewrite import BACKEND, Twin, write_twin
from ddit.exporter.graphs.trace import export_graph
from ddit.exporter.graphs.weights import WeightFiles
from ddit.exporter.memory import ROOM, fits
from ddit.profiles import Profile
from ddit.runtime import shapes
from ddit.runtime.backends.onnxruntime.host import OnnxRuntimeEngine, open_session
from ddit.runtime.bundle.manifest import ParityResult
from ddit.runtime.errors import BackendError, ParityError
from ddit.runtime.tools.samples import VOCABULARY, sample_inputs
from ddit.runtime.tools.verify import REFERENCE_FILE, reference_name, relative_error, tolerance

log = logging.getLogger(__name__)

Array = NDArray[np.float32] | NDArray[np.int64]
Arrays = dict[str, Array]
Report = Callable[[str], None]


@torch.no_grad()
def reference_arrays(job: GraphJob, cases: Sequence[Mapping[str, int]]) -> Arrays:
    """Seeded inputs and what the original model gives for them, by their names in ``parity.safetensors``."""
    device = roomy_device(float32_bytes(job))
    original = job.original(device)
    arrays: Arrays = {}
    for case, sizes in enumerate(cases):
        inputs = sample_inputs(
            job.inputs, sizes, seed=case, vocabulary=job.vocabulary or VOCABULARY, tables=job.tables(sizes)
        )
        with exact_float32():
            outputs = original(**{name: torch.from_numpy(value).to(device) for name, value in inputs.items()})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for name, value in inputs.items():
            arrays[reference_name(job.name, case, "input", name)] = value
        for spec, output in zip(job.outputs, outputs, strict=True):
            # contiguous, because safetensors stores an array's memory whatever its strides
            value = np.ascontiguousarray(output.float().cpu().numpy())
            arrays[reference_name(job.name, case, "output", spec.name)] = value
    return arrays


def float32_bytes(job: GraphJob) -> int:
    """Bytes of a job's weights in float32, in which the original computes."""
    return 4 * job.parameters


def roomy_device(size: int) -> torch.device:
    """A GPU where there is one that holds so many bytes of weights (a large model takes minutes on a CPU), or the CPU.

    Ask `fits` first whether the CPU's memory holds them.
    """
    if torch.cuda.is_available() and ROOM * size < torch.cuda.mem_get_info()[0]:
        return torch.device("cuda")
    return torch.device("cpu")


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep a GPU from computing float32 in TF32, which torch does in convolutions: 1e-3 off in FLUX.1's VAE."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def compare(
    job: GraphJob,
    path: Path,
    cases: Sequence[Mapping[str, int]],
    references: Arrays,
    checked: str = "full",
    *,
    twin: str | None = None,
    note: str = "",
) -> list[ParityResult]:
    """Run an exported graph, or its twin for the backend ``twin``, on the reference inputs and compare.

    Raises `ParityError` with the graph, the tensor and the figure when an error exceeds its tolerance.
    """
    engine = OnnxRuntimeEngine(open_session(path), job.name)
    used = {dim for spec in (*job.inputs, *job.outputs) for dim in spec.shape if isinstance(dim, str)}
    results = []
    for case, sizes in enumerate(cases):
        actual = engine.run(
            {spec.name: references[reference_name(job.name, case, "input", spec.name)] for spec in job.inputs}
        )
        known = {symbol: size for symbol, size in sizes.items() if any(dim[0] == symbol for dim in used)}
        for spec in job.outputs:
            expected = references[reference_name(job.name, case, "output", spec.name)].astype(np.float32)
            result = ParityResult(
                graph=job.name,
                tensor=spec.name,
                case=case,
                sizes=known,
                error=relative_error(actual[spec.name], expected),
                tolerance=tolerance(job.name, job.dtype, expected.shape),
                checked=checked,
                twin=twin,
                note=note,
            )
            results.append(accepted(result, f"the {twin} twin of {job.name}" if twin else f"graph {job.name}"))
    return results


def compare_with_twin(
    job: GraphJob,
    path: Path,
    cases: Sequence[Mapping[str, int]],
    references: Arrays,
    twin: Twin | None,
    checked: str = "full",
) -> list[ParityResult]:
    """`compare` a graph, and its twin with the same references.

    The graph has to be right. A twin that is not, or that cannot be run, is left out, and the graph's results say so.
    """
    why_not, results = twin.why_not if twin else "", []
    if twin and twin.file:
        try:
            results = compare(job, path.with_name(twin.file), cases, references, checked, twin=BACKEND)
        except (ParityError, BackendError) as error:
            why_not = str(error)
    note = f"{BACKEND} runs the graph itself: {why_not}" if why_not else ""
    return compare(job, path, cases, references, checked, note=note) + results


def accepted(result: ParityResult, what: str) -> ParityResult:
    """The result, if its error is below its tolerance. Raises `ParityError` otherwise."""
    log.info("parity of %s.%s at %s: %.2g", result.graph, result.tensor, result.sizes, result.error)
    if not result.error < result.tolerance:
        raise ParityError(
            f"{what} does not compute what the model computes: relative error of {result.tensor} is "
            f"{result.error:.2g} at {result.sizes}, allowed {result.tolerance:g}; "
            "please report it with the versions of torch and diffusers"
        )
    return result


def check_bundle(
    family: Family,
    jobs: Sequence[GraphJob],
    folder: Path,
    profile: Profile,
    opset: int,
    report: Report,
    twins: Mapping[str, Twin] | None = None,
) -> list[ParityResult]:
    """Check every graph of a bundle that is being written and its twin, by ``twins``, and keep the references in it.

    A graph that this machine cannot run as it is, is checked in float32 at reduced depth instead. Its references are
    kept all the same where torch can compute them, so that ``ddit-run verify`` completes the check elsewhere.
    """
    cases, twins = parity_cases(family, profile), twins or {}
    references: Arrays = {}
    results: list[ParityResult] = []
    elsewhere = set()
    for job in jobs:
        has_references = fits(float32_bytes(job))
        if has_references:
            report(f"running the original of {job.name}")
            references |= reference_arrays(job, cases)
        if has_references and onnxruntime_runs(job):
            results += compare_with_twin(job, folder / f"{job.name}.onnx", cases, references, twins.get(job.name))
        else:
            elsewhere.add(job.name)
    if elsewhere:
        # inside the bundle's folder: that disk has the space, and an interrupted export removes the folder
        reduced = folder / "reduced"
        reduced.mkdir()
        results += _check_reduced(family, elsewhere, reduced, cases, opset, report, twins)
        shutil.rmtree(reduced)
    # not save_file, which makes files that only their owner may read
    (folder / REFERENCE_FILE).write_bytes(save(references))
    return results


def _check_reduced(
    family: Family,
    names: set[str],
    folder: Path,
    cases: list[dict[str, int]],
    opset: int,
    report: Report,
    twins: Mapping[str, Twin],
) -> list[ParityResult]:
    """The same graphs in float32 with one block of each kind, exported and compared in a temporary folder."""
    weights = WeightFiles(folder)
    graphs = [export_graph(job, opset, weights) for job in family.reduced().jobs() if job.name in names]
    weights.write()
    results: list[ParityResult] = []
    for graph in graphs:
        report(f"checking {graph.job.name} in float32 at reduced depth")
        path = folder / graph.save(folder, weights)
        twin = write_twin(path) if graph.job.name in twins else None
        checked = f"in float32 with {REDUCED_DEPTH} block of each kind; verify on a machine that runs {family.dtype}"
        results += compare_with_twin(graph.job, path, cases, reference_arrays(graph.job, cases), twin, checked)
    return results


def parity_cases(family: Family, profile: Profile) -> list[dict[str, int]]:
    """Two sizes inside the profile: its smallest, and a larger one that is not square, with two samples if it may."""
    entry = profile.entry[0]
    steps = {"batch": 1, "text": 3} | {
        name: unit * (1 + number)
        for number, (name, unit) in enumerate(shapes.units(family.latent, family.levels).items())
    }
    steps |= {axis.name: axis.downscale for axis in family.latent.axes if axis.name not in steps}  # frames
    smallest = entry.at("minimum")
    larger = {name: min(size + steps[name], getattr(entry, name).maximum) for name, size in smallest.items()}
    return [shapes.to_symbols(family.latent, sizes) for sizes in (smallest, larger)]


def onnxruntime_runs(job: GraphJob) -> bool:
    """Whether ONNX Runtime's CPU provider can run a graph here: it has no kernels for bfloat16, and copies weights."""
    size = sum(parameter.numel() * parameter.dtype.itemsize for parameter in job.module.parameters())
    return job.dtype != "bf16" and fits(2 * size)
