"""torch module → ONNX graph, traced without weights; the weights are referenced, not copied.

The exporter keeps the parameters' own names (``optimize=False``), so that every initializer can be pointed at the
bundle's weight files afterwards. Then the graph is put in order: linear layers read their weight transposed from the
file instead of transposing it at load time, constants are folded, and the free dimensions get the contract's names.
"""

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.export import Dim

from ddit.exporter.graphs.job import GraphJob
from ddit.exporter.graphs.opset17 import LOWERED, TRACED, lower_to_opset17
from ddit.exporter.graphs.weights import Weight, WeightFiles
from ddit.runtime import shapes
from ddit.runtime.bundle.manifest import TensorSpec
from ddit.runtime.errors import ModelError

DTYPES = {"float32": torch.float32, "int64": torch.int64}
FOLD_LIMIT = 4096  # elements of the largest constant that is folded; weights are larger, and have no values yet


@dataclass
class ExportedGraph:
    """An exported graph whose initializers still wait for the weight files to be written."""

    job: GraphJob
    model: ir.Model
    places: dict[str, tuple[str, str]]  # initializer → file, name in it

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The files that the graph points into."""
        return tuple(sorted({file for file, _ in self.places.values()}))

    def save(self, folder: Path, weights: WeightFiles) -> str:
        """Point the initializers at the written weight files and save ``<name>.onnx``; returns the file's name."""
        for name, (weight_file, stored) in self.places.items():
            initializer = self.model.graph.initializers[name]
            initializer.const_value = weights.external_tensor(weight_file, stored)
            initializer.name = stored  # so that a host can find and share weights without reading ONNX
        file = f"{self.job.name}.onnx"
        ir.save(self.model, folder / file)
        return file


def export_graph(job: GraphJob, opset: int, weights: WeightFiles) -> ExportedGraph:
    """Trace a module and register its weights. Raises `ModelError` when the exporter fails."""
    traced = TRACED if opset == LOWERED else opset
    device = next((parameter.device for parameter in job.module.parameters()), torch.device("cpu"))
    with quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                job.module.eval(),
                **_arguments(job, device),
                output_names=[spec.name for spec in job.outputs],
                opset_version=traced,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # torch's exporter has many exceptions and no common base
            raise ModelError(f"torch could not export {job.name}: {_root_cause(error)}") from error
    assert program is not None
    model: ir.Model = program.model
    if model.opset_imports[""] != traced:  # torch may fall back to another opset and only log it
        raise ModelError(f"torch exported {job.name} at opset {model.opset_imports['']} instead of {traced}")

    parameters = {
        **dict(job.module.named_parameters(remove_duplicate=False)),
        **dict(job.module.named_buffers(remove_duplicate=False)),
    }
    places = {}
    transposed = _absorb_transposes(model.graph, set(parameters))
    for name, initializer in list(model.graph.initializers.items()):
        if name not in parameters:
            continue
        initializer.const_value = None  # without a value it is not folded
        parameter = parameters[name]
        flip = name in transposed
        weight = Weight(
            parameter.dtype,
            tuple(parameter.shape[::-1] if flip else parameter.shape),
            flip,
            lambda name=name: job.values(name),  # type: ignore[misc]
        )
        file, stored = job.place(name)
        places[name] = (file, weights.add(file, stored, weight))
    with quiet():
        _fold(model)
        if opset == LOWERED:
            lower_to_opset17(model, job.name)
        tidy(model)
    _name_dimensions(model, job)
    return ExportedGraph(
        job, model, {name: place for name, place in places.items() if name in model.graph.initializers}
    )


def _root_cause(error: BaseException) -> str:
    """The first line of the first error in the chain; the later ones only name the exporter's phase."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _arguments(job: GraphJob, device: torch.device) -> dict[str, Any]:
    """What torch.onnx.export is told of the inputs: example tensors and their free dimensions.

    They go in by name, so that the order of the specs does not matter. Where the module gathers the last of them in a
    ``*name``, because their number differs from model to model, they go in by position and get their names here.
    """
    tensors = {
        spec.name: torch.zeros(spec.resolve(job.trace_sizes), dtype=DTYPES[spec.dtype], device=device)
        for spec in job.inputs
    }
    free = _dynamic_shapes(job.inputs, job.outputs)
    parameters = inspect.signature(job.module.forward).parameters.values()
    if not any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters):
        return {"kwargs": tensors, "dynamic_shapes": free}
    *named, gathered = (one.name for one in parameters)
    return {
        "args": tuple(tensors.values()),
        "dynamic_shapes": {name: free[name] for name in named} | {gathered: tuple(list(free.values())[len(named) :])},
        "input_names": list(tensors),
    }


def _dynamic_shapes(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> dict[str, dict[int, object]]:
    """torch.export's description of the inputs' free dimensions, from the specs' symbols.

    Where tensors have ``H/4`` and ``H/6``, ``H`` is twelve times the number that is free, and ``H*2`` is 24 times it.
    """
    units = shapes.divisors(spec.shape for spec in (*inputs, *outputs))
    free = {symbol: Dim(f"{symbol}_{unit}" if unit > 1 else symbol) for symbol, unit in units.items()}

    def describe(dim: str) -> object:
        symbol, operator, number = shapes.split(dim)
        factor = units[symbol] * number if operator == "*" else units[symbol] // number
        return factor * free[symbol] if factor > 1 else free[symbol]

    return {
        spec.name: {axis: describe(dim) for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
        for spec in inputs
    }


def _absorb_transposes(graph: ir.Graph, parameters: set[str]) -> set[str]:
    """Remove ``Transpose(weight)`` nodes of linear layers; returns the weights that must be stored transposed.

    An engine would fold such a node into a private copy of the weight in every session, and sharing would be lost.
    """
    absorbed = set()
    for name in parameters & set(graph.initializers):
        weight = graph.initializers[name]
        users = [user for user, _ in weight.uses()]
        if not users or any(
            user.op_type != "Transpose" or list(user.attributes["perm"].as_ints()) != [1, 0] for user in users
        ):
            continue
        assert weight.shape is not None
        weight.shape = ir.Shape(list(weight.shape)[::-1])
        for user in users:
            user.outputs[0].replace_all_uses_with(weight)
            graph.remove(user, safe=True)
        absorbed.add(name)
    return absorbed


def _fold(model: ir.Model) -> None:
    """Fold constants; torch's list operations become plain ``Split`` nodes on the way.

    With `tidy` this is `onnxscript.optimizer.optimize_ir` with only those rewrite rules that find something in these
    graphs: with all of them it takes longer than the tracing.
    """
    from onnxscript.optimizer import fold_constants
    from onnxscript.rewriter import RewritePass
    from onnxscript.rewriter.rules.common import collapse_slice2_rule, collapse_slice_rule

    for _ in range(2):  # folding uncovers more to fold
        fold_constants(model, onnx_shape_inference=True, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT)
        RewritePass([collapse_slice_rule, collapse_slice2_rule])(model)


def tidy(model: ir.Model) -> None:
    """Remove duplicate nodes and constants, and nodes without effect."""
    from onnx_ir.passes import common

    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.NameFixPass(),
    )(model)


def _name_dimensions(model: ir.Model, job: GraphJob) -> None:
    """Give inputs and outputs the symbolic shapes of the contract, and drop torch's own names elsewhere."""
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
    for values, specs in ((model.graph.inputs, job.inputs), (model.graph.outputs, job.outputs)):
        for value, spec in zip(values, specs, strict=True):
            if value.name != spec.name:
                raise ModelError(f"{job.name} was exported with {value.name!r} where {spec.name!r} was expected")
            value.shape = ir.Shape(spec.shape)
    for node in model.graph:  # traces of the Python source, with this machine's paths
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "ddit", None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's exporter and onnxscript.

    They warn of what is intended here: dimensions that share a name, no torchvision, initializers without a value.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
