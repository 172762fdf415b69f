"""A denoising step as data: calls of graphs on named buffers.

A buffer has the name of the tensor that a graph reads from it or writes to it, so that what one graph gives is what the
next one takes. State is every buffer that has a ``next_`` twin: after the calls the twin takes its place. Backends
execute programs and know nothing of denoising (`ddit.runtime.backends.base.Workspace`).

FLUX.1's step at level 4 is two calls:

    level-4: latent, timestep, guidance, context, pooled, rope_cos, rope_sin → velocity
    step:    latent, velocity, timestep, dt, difference1, difference2, … → next_latent, next_difference1, …, deviation_4

Guidance by two passes is two calls more:

    level-4: latent, timestep, context, rope_cos, rope_sin → velocity_conditional
    level-4: latent, timestep, negative_context, rope_cos, rope_sin → velocity_unconditional
    guide:   velocity_conditional, velocity_unconditional, guidance → velocity
    step:    …

A step that runs no level has the prediction graph in the level's place:

    predict: velocities, prediction → velocity

What a method of reuse wants to know beforehand is a program of its own, run before the decision:

    gate: latent, timestep, guidance, pooled, gate_input → next_gate_input, gate_change, …
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ddit.runtime import shapes
from ddit.runtime.bundle import Manifest
from ddit.runtime.bundle.manifest import TensorSpec
from ddit.runtime.bundle.names import (
    CONDITIONAL,
    DEVIATION,
    GATE_TIMESTEP,
    GUIDE,
    MODEL_TIMESTEP,
    NEGATIVE,
    NEXT,
    PREDICT,
    TIMESTEP,
    UNCONDITIONAL,
    UPDATE,
    VELOCITY,
)
from ddit.runtime.conditioning.positions import level_tables

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Call:
    """One run of a graph: for every tensor of it the buffer that it reads or writes."""

    graph: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class Program:
    """The calls of one step. In one bundle and at one size, its name tells it from all others."""

    name: str
    calls: tuple[Call, ...]
    tables: Mapping[str, FloatArray]  # buffers that are the same for all samples and steps
    tokens: int  # of the image that a level runs on, in one sample: how large the step is

    @cached_property
    def state(self) -> tuple[str, ...]:
        """The buffers that a step changes for the next one."""
        return tuple(name.removeprefix(NEXT) for name in self._written if name.startswith(NEXT))

    @cached_property
    def results(self) -> tuple[str, ...]:
        """What a step tells the host: the outputs that neither a later call reads nor the next step."""
        read = {buffer for call in self.calls for buffer in call.inputs.values()}
        return tuple(name for name in self._written if name not in read and not name.startswith(NEXT))

    @cached_property
    def _written(self) -> tuple[str, ...]:
        return tuple(buffer for call in self.calls for buffer in call.outputs.values())


def level_program(manifest: Manifest, patch: int, sizes: Mapping[str, int], *, guided: bool = False) -> Program:
    """One step at a level, for latents of the size that ``sizes`` gives in symbols (``H`` and ``W``).

    ``guided``: by two passes of the level, one after the other; no more memory is needed than for one.
    """
    graph = manifest.level(patch).graph
    # what the model is told of the noise level may be rounded; the step graph needs it as it is
    plain = renamed(call(manifest, graph), inputs={TIMESTEP: MODEL_TIMESTEP})
    passes = [plain]
    if guided:
        other = {fed: NEGATIVE + fed for fed in text_inputs(manifest)}
        passes = [
            renamed(plain, outputs={VELOCITY: CONDITIONAL}),
            renamed(plain, inputs=other, outputs={VELOCITY: UNCONDITIONAL}),
            call(manifest, GUIDE),
        ]
    return Program(
        name=f"{graph}, guided" if guided else graph,
        calls=(*passes, call(manifest, UPDATE)),
        tables=level_tables(manifest.positions, manifest.latent, manifest.native, patch, sizes),
        tokens=shapes.image_tokens(manifest.latent, patch, sizes),
    )


def predicted_program(manifest: Manifest) -> Program:
    """One step that runs no level: its velocity is a weighted sum of those of the last computed steps."""
    return Program(name=PREDICT, calls=(call(manifest, PREDICT), call(manifest, UPDATE)), tables={}, tokens=0)


def gate_program(manifest: Manifest) -> Program | None:
    """What is run before a step to see how much it will differ from the one before; None where there is no gate.

    Its timestep has a buffer of its own: what the host sends a step of the model lies side by side.
    """
    if manifest.gate is None:
        return None
    told = renamed(call(manifest, manifest.gate.graph), inputs={TIMESTEP: GATE_TIMESTEP})
    return Program(name=told.graph, calls=(told,), tables={}, tokens=0)


class Programs:
    """The programs of a bundle, each made once."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self.predicted = predicted_program(manifest)
        self.gate = gate_program(manifest)
        self._made: dict[tuple[int, bool, tuple[tuple[str, int], ...]], Program] = {}

    def level(self, patch: int, sizes: Mapping[str, int], *, guided: bool = False) -> Program:
        """`level_program` for a size."""
        key = patch, guided, tuple(sorted(sizes.items()))
        if key not in self._made:
            self._made[key] = level_program(self.manifest, patch, sizes, guided=guided)
        return self._made[key]


def call(manifest: Manifest, graph: str) -> Call:
    """A graph on the buffers that have its tensors' names."""
    info = manifest.graphs[graph]
    return Call(graph, {spec.name: spec.name for spec in info.inputs}, {spec.name: spec.name for spec in info.outputs})


def renamed(plain: Call, *, inputs: Mapping[str, str] | None = None, outputs: Mapping[str, str] | None = None) -> Call:
    """A call that has other buffers for some of the tensors."""
    return replace(
        plain,
        inputs={tensor: (inputs or {}).get(tensor, buffer) for tensor, buffer in plain.inputs.items()},
        outputs={tensor: (outputs or {}).get(tensor, buffer) for tensor, buffer in plain.outputs.items()},
    )


def text_inputs(manifest: Manifest) -> tuple[str, ...]:
    """The levels' inputs that the text encoders feed."""
    return tuple(fed for encoder in manifest.encoders for fed in encoder.feeds.values())


def sample_buffers(manifest: Manifest) -> dict[str, TensorSpec]:
    """The buffers with a row for every sample, over all programs of a bundle."""
    names = [*(level.graph for level in manifest.levels), PREDICT, UPDATE]
    names += [manifest.gate.graph] if manifest.gate else []
    names += [GUIDE] if manifest.guidance.two_passes else []
    graphs = [manifest.graphs[name] for name in names]
    specs = {spec.name: spec for graph in graphs for spec in (*graph.inputs, *graph.outputs)}
    specs[GATE_TIMESTEP] = specs[MODEL_TIMESTEP] = specs[TIMESTEP]
    if manifest.guidance.two_passes:
        specs |= {NEGATIVE + fed: specs[fed] for fed in text_inputs(manifest)}
    return {name: spec for name, spec in specs.items() if spec.shape[0] == "B"}


def deviations(results: Mapping[str, FloatArray]) -> dict[int, FloatArray]:
    """The deviations (B, H/p, W/p) among a step's results, by patch."""
    return {int(name.removeprefix(DEVIATION)): value for name, value in results.items() if name.startswith(DEVIATION)}
