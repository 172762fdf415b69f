"""The parity gate: every exported graph against torch, before a bundle is accepted.

The original model runs on seeded inputs at two sizes of the profile, neither of them the traced one, the second not
square. Inputs and the original's outputs are kept in the bundle (``parity.safetensors``), so that ``ddit-run verify``
can repeat the comparison on any machine and backend, without torch.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from ddit.exporter.families.flux.model import FluxModel
from ddit.exporter.graphs.job import GraphJob
from ddit.exporter.graphs.trace import export_graph
from ddit.exporter.graphs.weights import WeightFiles
from ddit.profiles import Profile
from ddit.runtime import shapes
from ddit.runtime.backends.onnxruntime.host import OnnxRuntimeEngine, open_session
from ddit.runtime.bundle.manifest import ParityResult
from ddit.runtime.errors import ParityError
from ddit.runtime.tools.verify import REFERENCE_FILE, reference_name, relative_error, tolerance

log = logging.getLogger(__name__)

Array = NDArray[np.float32] | NDArray[np.int64]
Arrays = dict[str, Array]
Report = Callable[[str], None]

REDUCED_DEPTH = 1  # blocks kept where a graph is checked at reduced depth


def sample_inputs(job: GraphJob, sizes: Mapping[str, int], seed: int) -> Arrays:
    """Seeded inputs of a graph, of the magnitude that they have in use."""
    rng = np.random.default_rng(seed)
    inputs: Arrays = {}
    for spec in job.inputs:
        shape = spec.resolve(sizes)
        if spec.dtype == "int64":
            inputs[spec.name] = rng.integers(0, job.vocabulary, shape)
        elif spec.name == "timestep":
            inputs[spec.name] = rng.uniform(0.05, 1.0, shape).astype(np.float32)
        elif spec.name.startswith("rope_"):
            inputs[spec.name] = np.cos(rng.uniform(0.0, 6.3, shape)).astype(np.float32)
        else:
            inputs[spec.name] = rng.standard_normal(shape, dtype=np.float32)
    return inputs


@torch.no_grad()
def reference_arrays(job: GraphJob, cases: Sequence[Mapping[str, int]]) -> Arrays:
    """Seeded inputs and what the original model gives for them, by their names in ``parity.safetensors``.

    Runs on a GPU where there is one: a large model takes minutes on a CPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = job.reference().to(device)
    arrays: Arrays = {}
    for case, sizes in enumerate(cases):
        inputs = sample_inputs(job, sizes, seed=case)
        with _exact_float32():
            outputs = module(**{name: torch.from_numpy(value).to(device) for name, value in inputs.items()})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for name, value in inputs.items():
            arrays[reference_name(job.name, case, "input", name)] = value
        for spec, output in zip(job.outputs, outputs, strict=True):
            # contiguous, because safetensors stores an array's memory whatever its strides
            value = np.ascontiguousarray(output.float().cpu().numpy())
            arrays[reference_name(job.name, case, "output", spec.name)] = value
    return arrays


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Keep a GPU from computing float32 in TF32, which torch does in convolutions: 1e-3 off in FLUX.1's VAE."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def compare(
    job: GraphJob, path: Path, cases: Sequence[Mapping[str, int]], references: Arrays, checked: str = "full"
) -> list[ParityResult]:
    """Run an exported graph on the reference inputs and compare.

    Raises `ParityError` with the graph, the tensor and the figure when an error exceeds its tolerance.
    """
    engine = OnnxRuntimeEngine(open_session(path), job.name)
    used = {dim for spec in (*job.inputs, *job.outputs) for dim in spec.shape if isinstance(dim, str)}
    results = []
    for case, sizes in enumerate(cases):
        actual = engine.run(
            {spec.name: references[reference_name(job.name, case, "input", spec.name)] for spec in job.inputs}
        )
        for spec in job.outputs:
            expected = references[reference_name(job.name, case, "output", spec.name)]
            error = relative_error(actual[spec.name], expected.astype(np.float32))
            log.info("parity of %s.%s at %s: %.2g", job.name, spec.name, sizes, error)
            allowed = tolerance(job.name, job.dtype, expected.shape)
            if not error < allowed:
                raise ParityError(
                    f"graph {job.name} does not compute what the model computes: relative error of {spec.name} is "
                    f"{error:.2g} at {dict(sizes)}, allowed {allowed:g}; "
                    "please report it with the versions of torch and diffusers"
                )
            results.append(
                ParityResult(
                    graph=job.name,
                    tensor=spec.name,
                    case=case,
                    sizes={symbol: size for symbol, size in sizes.items() if any(dim[0] == symbol for dim in used)},
                    error=error,
                    tolerance=allowed,
                    checked=checked,
                )
            )
    return results


def check_bundle(
    model: FluxModel, jobs: Sequence[GraphJob], folder: Path, profile: Profile, opset: int, report: Report
) -> list[ParityResult]:
    """Check every graph of a bundle that is being written, and keep the references in it.

    A graph that this machine cannot run as it is, is checked in float32 at reduced depth instead. Its references are
    kept all the same where torch can compute them, so that ``ddit-run verify`` completes the check elsewhere.
    """
    cases = parity_cases(model, profile)
    references: Arrays = {}
    results: list[ParityResult] = []
    elsewhere = set()
    for job in jobs:
        if _fits(job, copies=1):
            report(f"running {job.name} with torch")
            references |= reference_arrays(job, cases)
        if job.dtype != "bf16" and _fits(job, copies=2):  # ONNX Runtime's CPU provider has no kernels for bfloat16
            results += compare(job, folder / f"{job.name}.onnx", cases, references)
        else:
            elsewhere.add(job.name)
    if elsewhere:
        # inside the bundle's folder, which is on the disk that has the space and vanishes if this is interrupted
        reduced = folder / "reduced"
        reduced.mkdir()
        results += _check_reduced(model, elsewhere, reduced, cases, opset, report)
        shutil.rmtree(reduced)
    # not save_file, whose files nobody but their owner may read
    (folder / REFERENCE_FILE).write_bytes(save(references))
    return results


def _check_reduced(
    model: FluxModel, names: set[str], folder: Path, cases: list[dict[str, int]], opset: int, report: Report
) -> list[ParityResult]:
    """The same graphs in float32 with one block of each kind, exported and compared in a temporary folder."""
    weights = WeightFiles(folder)
    small = replace(model, dtype="fp32", depth=REDUCED_DEPTH)
    graphs = [export_graph(job, opset, weights) for job in small.jobs() if job.name in names]
    weights.write()
    results: list[ParityResult] = []
    for graph in graphs:
        report(f"checking {graph.job.name} in float32 at reduced depth")
        path = folder / graph.save(folder, weights)
        checked = f"in float32 with {REDUCED_DEPTH} block of each kind; verify on a machine that runs {model.dtype}"
        results += compare(graph.job, path, cases, reference_arrays(graph.job, cases), checked)
    return results


def parity_cases(model: FluxModel, profile: Profile) -> list[dict[str, int]]:
    """Two sizes inside the profile: its smallest, and a larger one that is not square, with two samples if it may."""
    entry = profile.entry[0]
    steps = {"batch": 1, "text": 3} | {
        name: unit * (1 + number)
        for number, (name, unit) in enumerate(shapes.units(model.latent, model.levels).items())
    }
    smallest = entry.at("minimum")
    larger = {name: min(size + steps[name], getattr(entry, name).maximum) for name, size in smallest.items()}
    return [shapes.to_symbols(model.latent, sizes) for sizes in (smallest, larger)]


def _fits(job: GraphJob, copies: int) -> bool:
    """Whether memory holds the graph's weights so many times, with some left for the work."""
    size = sum(parameter.numel() * parameter.dtype.itemsize for parameter in job.module.parameters())
    return 1.25 * copies * size < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
