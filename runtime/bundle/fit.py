"""Whether a manifest's fields fit together: what one of them names, another one has, in the shape that it needs.

A bundle may come from anywhere. What is checked here cannot fail in the middle of a run.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ddit.runtime import shapes
from ddit.runtime.bundle.names import (
    CARRY,
    CONDITIONAL,
    CORRECTION,
    DEVIATION,
    DT,
    FRAMES,
    GAIN,
    GATE_CHANGES,
    GATE_INPUT,
    GROW,
    GROWING_TABLES,
    GUIDANCE,
    GUIDE,
    IDS,
    IMAGE,
    KEEP_ESTIMATE,
    KEEP_VELOCITY,
    LATENT,
    LATENT_FRAME,
    NEXT,
    NOISE,
    PREDICT,
    PREDICTION,
    PREDICTION_ERROR,
    SOLVER,
    TABLES,
    TIMESTEP,
    UNCONDITIONAL,
    UPDATE,
    VELOCITIES,
    VELOCITY,
)

if TYPE_CHECKING:
    from ddit.runtime.bundle.manifest import GraphInfo, Manifest, ScheduleInfo, TensorSpec

Shape = tuple[int | str, ...]

STEEPEST = 30.0  # |μ| of the sampler's shift e^μ: noise levels of float32 are all 1 or all 0 long before


def check_manifest(manifest: "Manifest") -> None:
    """Raise `ValueError` with what does not fit."""
    _check_levels(manifest)
    _check_names(manifest)
    _check_encoders(manifest)
    for patch in manifest.patches:
        _check_level(manifest, patch)
    _check_update(manifest)
    _check_guide(manifest)
    _check_gate(manifest)
    _check_grow(manifest)
    _check_decoder(manifest)
    _check_sampler(manifest)
    _check_schedule(manifest, manifest.schedule)
    _check_paths(manifest)
    for calibration in manifest.calibrations:
        if calibration.kind == "dynamic":
            _check_schedule(manifest, calibration)
        known = calibration.costs.levels.keys()
        if set(manifest.patches) - known:
            raise ValueError("a calibration lacks the costs of a level")
        if any(set(point.shares) - known for point in calibration.curve):
            raise ValueError("a calibration's curve names a level whose costs it lacks")


def _check_paths(manifest: "Manifest") -> None:
    check_unique("the path for", (f"{path.steps} steps at {path.size}" for path in manifest.paths))


def check_unique(what: str, names: Iterable[object]) -> None:
    """Raise `ValueError` for a name that stands twice."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{what} {twice[0]} stands twice")


def _check_levels(manifest: "Manifest") -> None:
    check_unique("level", (level.patch for level in manifest.levels))
    if manifest.native not in manifest.patches:
        raise ValueError(f"the native level {manifest.native} is not among the levels")
    if odd := [patch for patch in manifest.patches if patch % manifest.native]:
        raise ValueError(f"level {odd[0]} is not a multiple of the native level {manifest.native}")
    check_unique("axis", (axis.name for axis in manifest.latent.axes))
    names = [axis.name for axis in manifest.latent.axes]
    if names not in (["height", "width"], ["frames", "height", "width"]):
        raise ValueError("a latent has a height and a width, and a clip's has frames before them")
    if any((entry.frames is not None) != manifest.latent.has_frames for entry in manifest.profile.entry):
        raise ValueError("the profile has frames and the latent has none, or the other way round")
    if odd_axes := {axis.axis for axis in manifest.positions.axes} - {*names, None}:
        raise ValueError(f"the positions turn with {min(map(str, odd_axes))}, which the latent has not")


def _check_names(manifest: "Manifest") -> None:
    """Graphs and files that are named are there."""
    named = [level.graph for level in manifest.levels] + [one.graph for one in manifest.encoders]
    named += [manifest.gate.graph] if manifest.gate else []
    named += [*manifest.decoder.graphs, UPDATE, PREDICT, GROW]
    named += [GUIDE] if manifest.guidance.two_passes else []
    for graph in named:
        if graph not in manifest.graphs:
            raise ValueError(f"there is no graph {graph!r}")
    check_unique("graph", named)
    files = [file for graph in manifest.graphs.values() for file in graph.all_files]
    for file in (*files, *(one.tokenizer.file for one in manifest.encoders)):
        if file not in manifest.files:
            raise ValueError(f"file {file!r} has no entry in files")
    for name, info in manifest.graphs.items():
        if odd := info.twin_weights.keys() - info.twins.keys():
            raise ValueError(f"{name}: there are weights of a twin for {min(odd)}, and no twin")
    check_unique(
        "the graph's file",
        (file for graph in manifest.graphs.values() for file in (graph.file, *graph.twins.values())),
    )
    sides = {shapes.SYMBOLS[axis.name] for axis in manifest.latent.sides}
    others = {"B", "L", *(shapes.SYMBOLS[axis.name] for axis in manifest.latent.axes)}
    unit = math.lcm(*manifest.patches)
    for name, info in manifest.graphs.items():
        specs = (*info.inputs, *info.outputs)
        check_unique(f"{name}: tensor", (spec.name for spec in specs))
        for symbol, number in shapes.divisors(spec.shape for spec in specs).items():
            if symbol not in others:
                raise ValueError(f"{name}: nobody knows the dimension {symbol!r}")
            if (unit if symbol in sides else 1) % number:
                raise ValueError(f"{name}: {symbol} is not always a multiple of {number}")


def _check_encoders(manifest: "Manifest") -> None:
    check_unique("input", (fed for one in manifest.encoders for fed in one.feeds.values()))
    taken = {spec.name for level in manifest.levels for spec in manifest.graphs[level.graph].inputs}
    told = {fed for one in manifest.encoders for fed in one.feeds.values()} | (
        {GUIDANCE} if manifest.guidance.embedded else set()
    )
    if idle := sorted(told - taken):
        raise ValueError(f"no level takes the input {idle[0]!r}")
    for one in manifest.encoders:
        info = manifest.graphs[one.graph]
        tokens = "L" if one.free_length else one.tokenizer.length
        _check_tensors(one.graph, info.inputs, {IDS: ("B", tokens)}, {IDS}, dtype="int64")
        if one.feeds.keys() != _shapes(info.outputs).keys():
            raise ValueError(f"{one.graph}: feeds and outputs are not the same")
        _check_rows(one.graph, info.outputs)


def _check_level(manifest: "Manifest", patch: int) -> None:
    graph = manifest.level(patch).graph
    info = manifest.graphs[graph]
    table: Shape = (*manifest.latent.patch_grid(patch), sum(axis.dimensions for axis in manifest.positions.axes))
    inputs = {**_model_inputs(manifest), **dict.fromkeys(TABLES, table)}
    _check_tensors(graph, info.inputs, inputs, {LATENT, TIMESTEP})
    _check_rows(graph, info.outputs)
    if odd := [spec.name for spec in info.outputs if spec.name.startswith((NEXT, DEVIATION))]:
        raise ValueError(f"{graph}: {odd[0]} is an output of {UPDATE} only")


def _model_inputs(manifest: "Manifest") -> dict[str, Shape]:
    """What a graph of the model may take at every size: the latent, the noise level and the conditions."""
    fed: dict[str, Shape] = {
        one.feeds[spec.name]: spec.shape for one in manifest.encoders for spec in manifest.graphs[one.graph].outputs
    }
    scale: dict[str, Shape] = {GUIDANCE: ("B",)} if manifest.guidance.embedded else {}
    return {LATENT: manifest.latent.shape, TIMESTEP: ("B",), **fed, **scale}


def _check_gate(manifest: "Manifest") -> None:
    """The gate graph takes what a level takes and its own output of the step before, which no other graph knows."""
    if manifest.gate is None:
        return
    graph, info = manifest.gate.graph, manifest.graphs[manifest.gate.graph]
    state = _shapes(info.inputs).get(GATE_INPUT, ())
    grid = _plain(("B", *manifest.latent.patch_grid(manifest.native)))
    if state[:-1] not in (grid, ("B",)) or not isinstance(state[-1], int):
        raise ValueError(f"{graph}: {GATE_INPUT} has to have the shape {_text((*grid, 'width'))} or (B, width)")
    inputs = {**_model_inputs(manifest), GATE_INPUT: state}
    _check_tensors(graph, info.inputs, inputs, {TIMESTEP, GATE_INPUT})
    outputs: dict[str, Shape] = {NEXT + GATE_INPUT: state, **dict.fromkeys(GATE_CHANGES, ("B",))}
    _check_tensors(graph, info.outputs, outputs, outputs)
    own = {GATE_INPUT, *outputs}
    for other in (*(level.graph for level in manifest.levels), UPDATE):
        specs = (*manifest.graphs[other].inputs, *manifest.graphs[other].outputs)
        if taken := sorted(own & _shapes(specs).keys()):
            raise ValueError(f"{other}: {taken[0]} is a tensor of {graph} only")


def _check_update(manifest: "Manifest") -> None:
    """The step graph takes what the levels give, what the host tells, and what it gave itself a step before."""
    info = manifest.graphs[UPDATE]
    outputs = _shapes(info.outputs)
    kept = _kept_velocities(manifest)
    known: dict[str, Shape] = {
        **dict.fromkeys((TIMESTEP, CORRECTION, KEEP_ESTIMATE, KEEP_VELOCITY), ("B",)),
        **({SOLVER: ("B", manifest.sampler.order + 1)} if manifest.sampler.kind == "flow_unipc" else {DT: ("B",)}),
        LATENT: manifest.latent.shape,
        VELOCITIES: ("B", kept, *manifest.latent.shape[1:]),
        PREDICTION: ("B", kept),
    }
    if manifest.coarse:
        known[CARRY] = ("B", len(manifest.coarse))
    for name, shape in _shapes(info.inputs).items():
        if name not in known and NEXT + name in outputs:
            known[name] = shape
    levels = [manifest.graphs[level.graph] for level in manifest.levels]
    for name, shape in _shapes(levels[0].outputs).items():
        if any(_shapes(level.outputs).get(name) != shape for level in levels):
            raise ValueError(f"the levels' outputs differ in {name}")
        known[name] = shape
    _check_tensors(UPDATE, info.inputs, known, {LATENT, VELOCITIES, PREDICTION})
    _check_rows(UPDATE, info.inputs)
    state = {NEXT + name: shape for name, shape in _shapes(info.inputs).items() if NEXT + name in outputs}
    deviations: dict[str, Shape] = {
        f"{DEVIATION}{patch}": ("B", *manifest.latent.patch_grid(patch)) for patch in manifest.coarse
    }
    error: Shape = ("B", *manifest.latent.patch_grid(manifest.native))
    results = {
        NEXT + LATENT: manifest.latent.shape,
        NEXT + VELOCITIES: known[VELOCITIES],
        PREDICTION_ERROR: error,
        **state,
        **deviations,
    }
    _check_tensors(UPDATE, info.outputs, results, results)
    predict = manifest.graphs[PREDICT]
    taken = {name: known[name] for name in (VELOCITIES, PREDICTION)}
    _check_tensors(PREDICT, predict.inputs, taken, taken)
    given = _shapes(levels[0].outputs)
    _check_tensors(PREDICT, predict.outputs, given, given)
    for graph in levels:
        _check_apart(graph, info)


def _check_guide(manifest: "Manifest") -> None:
    """The guide graph takes what a level gives, twice, and gives the same once."""
    if not manifest.guidance.two_passes:
        return
    info, latent = manifest.graphs[GUIDE], manifest.latent.shape
    given: dict[str, Shape] = {CONDITIONAL: latent, UNCONDITIONAL: latent, GUIDANCE: ("B",)}
    _check_tensors(GUIDE, info.inputs, given, given)
    _check_tensors(GUIDE, info.outputs, {VELOCITY: latent}, {VELOCITY})
    for level in manifest.levels:
        _check_tensors(level.graph, manifest.graphs[level.graph].outputs, {VELOCITY: latent}, {VELOCITY})


def _check_grow(manifest: "Manifest") -> None:
    """The grow graph takes two latents, two numbers a sample, and tables that are squares along the latent's sides."""
    latent = manifest.latent.shape
    height, width = latent[-2:]
    tables: tuple[Shape, ...] = ((height, height), (width, width), (height, height), (width, width), (height, width))
    known: dict[str, Shape] = {
        **dict.fromkeys((LATENT, NOISE), latent),
        **dict.fromkeys((TIMESTEP, GAIN), ("B",)),
        **dict(zip(GROWING_TABLES, tables, strict=True)),
    }
    info = manifest.graphs[GROW]
    _check_tensors(GROW, info.inputs, known, known)
    _check_tensors(GROW, info.outputs, {NEXT + LATENT: latent}, {NEXT + LATENT})


def _kept_velocities(manifest: "Manifest") -> int:
    """How many velocities are kept: what the prediction graph takes."""
    shape = _shapes(manifest.graphs[PREDICT].inputs).get(PREDICTION, ())
    if len(shape) != 2 or not isinstance(shape[1], int):
        raise ValueError(f"{PREDICT}: {PREDICTION} has to have the shape (B, number of velocities)")
    return shape[1]


def _check_apart(level: "GraphInfo", update: "GraphInfo") -> None:
    """A buffer has one shape in all graphs of a step."""
    shapes_ = _shapes((*level.inputs, *level.outputs))
    for name, shape in _shapes((*update.inputs, *update.outputs)).items():
        if shapes_.get(name, shape) != shape:
            raise ValueError(f"{UPDATE}: {name} has another shape in the levels")


def _check_decoder(manifest: "Manifest") -> None:
    decoder, latent = manifest.decoder, manifest.latent
    if (decoder.kind == "video") != latent.has_frames:
        raise ValueError("clips have a decoder of the kind video, and pictures one of the kind image")
    sides = [f"{shapes.SYMBOLS[axis.name]}*{axis.downscale}" for axis in latent.sides]
    if decoder.kind == "image":
        info = manifest.graphs[decoder.graph]
        _check_tensors(decoder.graph, info.inputs, {LATENT: latent.shape}, {LATENT})
        _check_tensors(decoder.graph, info.outputs, {IMAGE: ("B", 3, *sides)}, {IMAGE})
        return
    frame: Shape = ("B", latent.channels, 1, *(shapes.SYMBOLS[axis.name] for axis in latent.sides))
    following = manifest.graphs[decoder.following]
    state = {name: shape for name, shape in _shapes(following.inputs).items() if name != LATENT_FRAME}
    _check_rows(decoder.following, following.inputs)
    _check_tensors(decoder.first, manifest.graphs[decoder.first].inputs, {LATENT_FRAME: frame}, {LATENT_FRAME})
    _check_tensors(decoder.following, following.inputs, {**state, LATENT_FRAME: frame}, {LATENT_FRAME})
    for graph, count in ((decoder.first, 1), (decoder.following, latent.axes[0].downscale)):
        given: dict[str, Shape] = {FRAMES: ("B", 3, count, *sides)}
        given |= {NEXT + name: shape for name, shape in state.items()}
        _check_tensors(graph, manifest.graphs[graph].outputs, given, given)


def _check_sampler(manifest: "Manifest") -> None:
    from ddit.runtime.samplers.sigmas import flow_shift  # which imports the manifest

    sampler = manifest.sampler
    if sampler.kind != "flow_match_euler" or not sampler.use_dynamic_shifting:
        return
    for entry in manifest.profile.entry:
        for bound in ("minimum", "maximum"):
            symbols = shapes.to_symbols(manifest.latent, entry.at(bound))
            tokens = shapes.image_tokens(manifest.latent, manifest.native, symbols)
            if abs(flow_shift(sampler, tokens)) > STEEPEST:
                raise ValueError("the sampler's shift leaves no noise levels between 0 and 1 at the profile's sizes")


def _check_schedule(manifest: "Manifest", schedule: "ScheduleInfo") -> None:
    if schedule.smooth and set(manifest.coarse) - schedule.smooth[0].statistic.keys():
        raise ValueError("smooth lacks the statistic of a coarse level")


def _check_tensors(
    graph: str,
    specs: Iterable["TensorSpec"],
    known: Mapping[str, Shape],
    needed: Iterable[str],
    dtype: str = "float32",
) -> None:
    """Every tensor is a known one in its shape, and none that is needed is missing."""
    found = {spec.name: spec for spec in specs}
    for name in needed:
        if name not in found:
            raise ValueError(f"{graph} has no tensor {name!r}")
    for name, spec in found.items():
        if name not in known:
            raise ValueError(f"{graph}: nobody knows the tensor {name!r}")
        if _plain(spec.shape) != _plain(known[name]) or spec.dtype != dtype:
            raise ValueError(
                f"{graph}: {name} is {spec.dtype} {_text(spec.shape)}, it has to be {dtype} {_text(known[name])}"
            )


def _check_rows(graph: str, specs: Iterable["TensorSpec"]) -> None:
    for spec in specs:
        if spec.shape[0] != "B" or spec.dtype != "float32":
            raise ValueError(f"{graph}: {spec.name} has to be float32, with a row for every sample")


def _shapes(specs: Iterable["TensorSpec"]) -> dict[str, Shape]:
    return {spec.name: _plain(spec.shape) for spec in specs}


def _plain(shape: Shape) -> Shape:
    """One form for shapes that are the same: ``("H/1",)`` is ``("H",)``."""
    return tuple(dim if isinstance(dim, int) or shapes.split(dim)[2] != 1 else shapes.split(dim)[0] for dim in shape)


def _text(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))})"
