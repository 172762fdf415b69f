"""The denoising loop of a single model: a ``Loop`` that decides every step, and runs it.

Its body follows docs/spec/sampling.md, "One step". It asks the adaptive policy first, then picks a level; an ``If``
runs that level or the prediction graph; the step graph moves the latent; then the history takes the step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ddit.exporter.single.splice import Branch, Outermost, Part, Values
from ddit.runtime.bundle import Manifest
from ddit.runtime.bundle.manifest import TensorSpec
from ddit.runtime.bundle.names import (
    CARRY,
    CORRECTION,
    DEVIATION,
    DT,
    KEEP_ESTIMATE,
    KEEP_VELOCITY,
    LATENT,
    NEXT,
    PREDICT,
    PREDICTION,
    PREDICTION_ERROR,
    TIMESTEP,
    UPDATE,
    VELOCITY,
)
from ddit.runtime.policies.adaptive import LONGEST
from ddit.runtime.policies.base import DIFFERENCE_ORDER
from ddit.runtime.policies.prediction import KEPT_VELOCITIES

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
NODES = KEPT_VELOCITIES + 1  # computed steps that the adaptive policy looks back to
NATIVE_DONE, STATISTIC = "native_done", "statistic"
NOTHING = -1.0  # in the place of a statistic or an error that is not known

# what `predict_step` and `remember_step` know before the first step: the level 0 is none
HISTORY: Mapping[str, np.generic | np.ndarray] = {
    "last": np.int64(0),
    "running": np.int64(0),
    "nodes": np.zeros(NODES),
    "known": np.int64(0),
    "error": np.float64(NOTHING),
    "signed": np.float64(0),
    "absolute": np.float64(0),
}
PREDICTING = ("nodes", "known", "error", "signed", "absolute")


@dataclass(frozen=True)
class Run:
    """What is the same at every step: values of the outermost graph."""

    manifest: Manifest
    backend: str  # whose twins of the levels run
    settings: Values  # the model's inputs, by name
    sigmas: ir.Value  # (N + 1,)
    smooth: ir.Value | None  # (N, P), a smooth picture's statistic, for P coarse patches; None where there are none
    conditions: Values  # the levels' inputs, by name
    tables: Mapping[int, Values]  # the same, by patch


@dataclass(frozen=True)
class Denoised:
    """What the loop gives."""

    latent: ir.Value  # (1, C, H, W)
    level: ir.Value  # (N,) the patch of every step, 0 for a predicted one
    expected_error: ir.Value  # (N,)
    statistic: ir.Value | None  # (N, P)


def denoise(main: Part, run: Run, latent: ir.Value) -> Denoised:
    """The loop, from a latent (1, C, H, W) on."""
    outermost, coarse = main.outermost, run.manifest.coarse
    start = {spec.name: latent if spec.name == LATENT else _zeros(main, spec, latent) for spec in _state(run.manifest)}
    start |= {name: outermost.constant(value, f"first {name}") for name, value in HISTORY.items()}
    start[NATIVE_DONE] = outermost.constant(np.False_, f"first {NATIVE_DONE}")
    if coarse:
        start[STATISTIC] = outermost.constant(np.zeros(len(coarse), np.float32), f"first {STATISTIC}")
    body, shown = _body(outermost, run, start)
    found = main.ops("Loop", [run.settings["steps"], None, *start.values()], len(start) + len(shown), body=body)
    last = dict(zip([*start, *shown], found, strict=True))
    return Denoised(last[LATENT], last["level"], last["expected_error"], last.get("shown_statistic"))


def _body(outermost: Outermost, run: Run, start: Values) -> tuple[ir.Graph, list[str]]:
    """The body, and what it shows of every step, in order."""
    part, manifest = Part(outermost), run.manifest
    step = ir.Value(name="step", type=ir.TensorType(INT64), shape=ir.Shape([]))
    going = ir.Value(name="going", type=ir.TensorType(BOOL), shape=ir.Shape([]))
    now = {
        name: ir.Value(name=name, type=_type(value), shape=_shape(name, value, manifest))
        for name, value in start.items()
    }
    decision = _decide(part, run, step, now)
    state = {spec.name: now[spec.name] for spec in _state(manifest)}
    given = {**run.conditions, **state, **_rows(part, run, now, decision)}
    given[VELOCITY] = _velocity(part, run, given, decision)
    results = part.graph(UPDATE, manifest.graphs[UPDATE].file, given)

    following = {name: results[NEXT + name] for name in state}
    remembered = part.rule(
        "remember_step",
        decision.sigma,
        decision.level,
        *(now[name] for name in HISTORY),
        decision.move,
        results[PREDICTION_ERROR],
        run.settings["order"],
        decision.predicted,
    )
    following |= zip(HISTORY, remembered, strict=True)
    following[NATIVE_DONE] = part.op("Or", now[NATIVE_DONE], decision.native)
    shown = {
        "level": part.op("Where", decision.predicted, outermost.constant(0), decision.level),
        "expected_error": part.op("Identity", decision.expected_error),
    }
    if manifest.coarse:
        deviations = [results[f"{DEVIATION}{patch}"] for patch in manifest.coarse]
        quantiles = [_row(part, part.rule("quantile", one, run.settings["rho"])[0]) for one in deviations]
        following[STATISTIC] = part.op("Concat", *quantiles, axis=0)
        three = part.op("GreaterOrEqual", step, outermost.constant(DIFFERENCE_ORDER - 1))
        nothing = outermost.constant(np.float32(NOTHING))
        shown["shown_statistic"] = part.op("Where", three, following[STATISTIC], nothing)
    outputs = [part.op("Identity", going), *(following[name] for name in start), *shown.values()]
    return ir.Graph([step, going, *now.values()], outputs, nodes=part.nodes, name="one step"), list(shown)


@dataclass(frozen=True)
class _Decision:
    """What a step does, and what `predict_step` says of it."""

    sigma: ir.Value
    after: ir.Value  # the next noise level
    level: ir.Value  # the patch that it runs at, if it is computed
    predicted: ir.Value  # whether it is not
    computed: ir.Value
    native: ir.Value  # whether it runs the native level
    weights: ir.Value
    correction: ir.Value
    move: ir.Value
    expected_error: ir.Value


def _decide(part: Part, run: Run, step: ir.Value, now: Values) -> _Decision:
    """The adaptive policy first, then the level of a step that it does not predict."""
    settings, constant = run.settings, part.outermost.constant
    sigma = part.op("Gather", run.sigmas, step)
    after = part.op("Gather", run.sigmas, part.op("Add", step, constant(1)))
    weights, correction, move, predicted, expected = part.rule(
        "predict_step",
        sigma,
        after,
        *(now[name] for name in PREDICTING),
        settings["order"],
        settings["tolerance"],
        constant(np.float64(LONGEST), "longest"),
    )
    native = level = constant(run.manifest.native)
    if run.manifest.coarse:
        assert run.smooth is not None
        # of the step before; before the first one nothing is judged
        smooth = part.op("Gather", run.smooth, part.op("Max", part.op("Sub", step, constant(1)), constant(0)))
        (level,) = part.rule(
            "dynamic_level",
            step,
            now["last"],
            now["running"],
            now[STATISTIC],
            smooth,
            constant([*run.manifest.coarse]),
            native,
            *(settings[name] for name in ("tau", "warmup", "hold", "coarsest")),
        )
    (level,) = part.rule("listed_level", step, settings["levels"], constant([*run.manifest.patches]), native, level)
    computed = part.op("Not", predicted)
    runs_native = part.op("And", computed, part.op("Equal", level, native))
    return _Decision(sigma, after, level, predicted, computed, runs_native, weights, correction, move, expected)


def _rows(part: Part, run: Run, now: Values, decision: _Decision) -> Values:
    """What is new to the graphs at every step."""
    zero = part.outermost.constant(np.float32(0))
    correction = part.op("Where", decision.computed, part.op("Cast", decision.correction, to=FLOAT), zero)
    rows = {
        TIMESTEP: decision.sigma,
        DT: part.op("Sub", decision.after, decision.sigma),
        KEEP_ESTIMATE: part.op("Cast", decision.native, to=FLOAT),
        KEEP_VELOCITY: part.op("Cast", decision.computed, to=FLOAT),
        PREDICTION: decision.weights,
        CORRECTION: correction,
    }
    if run.manifest.coarse:
        runs = part.op("Equal", part.outermost.constant([*run.manifest.coarse]), decision.level)
        carrying = part.op("And", part.op("And", decision.computed, now[NATIVE_DONE]), runs)
        rows[CARRY] = part.op("Where", carrying, run.settings["carry"], zero)
    return {name: _row(part, value) for name, value in rows.items()}


def _velocity(part: Part, run: Run, given: Values, decision: _Decision) -> ir.Value:
    """What the step's level, or the prediction graph, says: a chain of branches, of which one is run."""
    graphs = run.manifest.graphs

    def branch(name: str, file: str, inputs: Values) -> Branch:
        own = Part(part.outermost)
        return own, own.graph(name, file, inputs)[VELOCITY]

    *others, last = run.manifest.levels
    chain = branch(last.graph, graphs[last.graph].on(run.backend).file, {**given, **run.tables[last.patch]})
    for one in reversed(others):
        this = branch(one.graph, graphs[one.graph].on(run.backend).file, {**given, **run.tables[one.patch]})
        own = Part(part.outermost)
        chosen = own.op("Equal", decision.level, own.outermost.constant(one.patch))
        chain = own, own.choose(one.graph, chosen, this, chain)
    return part.choose(PREDICT, decision.predicted, branch(PREDICT, graphs[PREDICT].file, given), chain)


def _state(manifest: Manifest) -> list[TensorSpec]:
    """What a step changes for the next one."""
    written = {spec.name for spec in manifest.graphs[UPDATE].outputs}
    return [spec for spec in manifest.graphs[UPDATE].inputs if NEXT + spec.name in written]


def _zeros(part: Part, spec: TensorSpec, latent: ir.Value) -> ir.Value:
    """Zeros of a tensor's shape, which is the latent's or has more of it."""
    constant = part.outermost.constant
    shape = part.op("Shape", latent)
    sides = [part.op("Gather", shape, constant([axis])) for axis in (2, 3)]
    sizes = {"B": constant([1]), "H": sides[0], "W": sides[1]}
    whole = part.op("Concat", *(constant([dim]) if isinstance(dim, int) else sizes[dim] for dim in spec.shape), axis=0)
    return part.op("ConstantOfShape", whole, value=ir.tensor(np.zeros(1, np.float32)))


def _row(part: Part, value: ir.Value) -> ir.Value:
    """With a first axis of one sample."""
    return part.op("Unsqueeze", value, part.outermost.constant([0]))


def _type(value: ir.Value) -> ir.TypeProtocol:
    return value.type or ir.TensorType(FLOAT)


def _shape(name: str, value: ir.Value, manifest: Manifest) -> ir.Shape | None:
    """A state's shape: that of its first value, or what the manifest says."""
    known = {spec.name: spec.shape for spec in _state(manifest)}
    return ir.Shape([1, *known[name][1:]]) if name in known else value.shape
