"""The parity gate: every exported graph against torch, before a bundle is accepted.

The original model runs on seeded inputs at two sizes of the profile, neither of them the traced one, the second not
square. Inputs and the original's outputs are kept in the bundle (``parity.safetensors``), so that ``ddit-run verify``
can repeat the comparison on any machine and backend, without torch.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ddit.exporter.graphs import GraphJob
from ddit.runtime.backends.onnxruntime import OnnxRuntimeEngine, open_session
from ddit.runtime.bundle import ParityResult
from ddit.runtime.errors import ParityError
from ddit.runtime.verify import TOLERANCES, reference_name, relative_error

log = logging.getLogger(__name__)

Array = NDArray[np.float32] | NDArray[np.int64]
Arrays = dict[str, Array]


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
def reference_outputs(module: nn.Module, job: GraphJob, inputs: Arrays) -> Arrays:
    """What the original model gives."""
    outputs = module(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # contiguous, because safetensors stores an array's memory whatever its strides
    return {spec.name: np.ascontiguousarray(value.numpy()) for spec, value in zip(job.outputs, outputs, strict=True)}


def check_graph(
    job: GraphJob, path: Path, cases: list[dict[str, int]], checked: str = "full"
) -> tuple[list[ParityResult], Arrays]:
    """Compare an exported graph with the original model; returns the figures and the arrays to keep in the bundle.

    Raises `ParityError` with the graph, the tensor and the figure when an error exceeds its tolerance.
    """
    module = job.reference()
    engine = OnnxRuntimeEngine(open_session(path), job.name)
    results: list[ParityResult] = []
    kept: Arrays = {}
    for case, sizes in enumerate(cases):
        inputs = sample_inputs(job, sizes, seed=case)
        expected = reference_outputs(module, job, inputs)
        actual = engine.run(inputs)
        for name, value in inputs.items():
            kept[reference_name(job.name, case, "input", name)] = value
        for name, value in expected.items():
            kept[reference_name(job.name, case, "output", name)] = value
            error = relative_error(actual[name], value.astype(np.float32))
            tolerance = TOLERANCES[job.dtype]
            log.info("parity of %s.%s at %s: %.2g", job.name, name, sizes, error)
            if not error < tolerance:
                raise ParityError(
                    f"graph {job.name} does not compute what the model computes: relative error of {name} is "
                    f"{error:.2g} at {sizes}, allowed {tolerance:g}; "
                    "please report it with the versions of torch and diffusers"
                )
            used = {spec for tensor in (*job.inputs, *job.outputs) for spec in tensor.shape if isinstance(spec, str)}
            symbols = {symbol: size for symbol, size in sizes.items() if any(dim.startswith(symbol) for dim in used)}
            results.append(
                ParityResult(
                    graph=job.name,
                    tensor=name,
                    case=case,
                    sizes=symbols,
                    error=error,
                    tolerance=tolerance,
                    checked=checked,
                )
            )
    return results, kept
