"""Runs in flight on one backend: samples are admitted, step together where they can, and are retired.

A pipeline drives a session to its end; a server keeps one open. Samples that run the same level at the same size share
a call of the engines, whatever step each is at, and nothing that one of them does depends on the others. A sample whose
latent grows moves to buffers of the larger size and starts anew there, with no memory of its steps before.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from time import perf_counter

import numpy as np

from ddit.runtime import shapes
from ddit.runtime.backends.base import Backend, FloatArray, Workspace
from ddit.runtime.bundle.manifest import SamplerInfo
from ddit.runtime.bundle.names import (
    CARRY,
    CORRECTION,
    DT,
    GAIN,
    GATE_CHANGES,
    GATE_INPUT,
    GATE_TIMESTEP,
    GROW,
    KEEP_ESTIMATE,
    KEEP_VELOCITY,
    LATENT,
    MODEL_TIMESTEP,
    NEXT,
    NOISE,
    PREDICT,
    PREDICTION,
    PREDICTION_ERROR,
    SOLVER,
    TIMESTEP,
    VELOCITIES,
)
from ddit.runtime.complexity import Complexity
from ddit.runtime.errors import BackendError, NotFiniteError, not_finite
from ddit.runtime.policies import DIFFERENCE_ORDER, Change, Decision, RunHistory, statistics
from ddit.runtime.policies.prediction import root_mean_square
from ddit.runtime.request import Run
from ddit.runtime.samplers.growing import growing_tables, in_corner, noise_coefficients
from ddit.runtime.samplers.sigmas import model_timestep
from ddit.runtime.samplers.unipc import coefficients
from ddit.runtime.step import Programs, deviations, sample_buffers
from ddit.runtime.trace import StepRecord, Trace


class StepError(BackendError):
    """An engine failed, or gave numbers that are none. Only these samples are lost; the others can go on."""

    def __init__(self, message: str, samples: Sequence["Sample"]):
        super().__init__(message)
        self.samples = list(samples)


class NotFiniteStepError(StepError, NotFiniteError):
    """A graph gave NaN or infinity for these samples."""


@dataclass(eq=False)
class Sample:
    """A run in flight."""

    run: Run
    trace: Trace
    history: RunHistory
    rows: Mapping[str, FloatArray]  # what its rows of the buffers are at first, and where its latent has grown
    native_done: bool = False  # whether there is a native step's estimate, whose detail coarse steps carry on
    decision: Decision | None = None  # what its next step does, once the policy has been asked
    place: tuple[Workspace, int] | None = field(default=None, repr=False)  # where its rows are, once it has stepped

    @property
    def done(self) -> bool:
        """Whether all its steps are done."""
        return self.history.step == self.run.steps

    @property
    def sizes(self) -> Mapping[str, int]:
        """The symbols' values for its latent as it is now."""
        return self.run.scales[self.history.scale]

    def told(self, sampler: SamplerInfo) -> float:
        """What the model is told of the noise level of its next step."""
        step = self.history.step
        sigma = float(self.history.sigmas[step])
        # where the latent has just grown, the step starts at a noise level of its own
        return float(self.run.timesteps[step]) if sigma == self.run.sigmas[step] else model_timestep(sampler, sigma)


class Session:
    """Samples in flight. Belongs to one thread."""

    def __init__(self, backend: Backend, programs: Programs | None = None):
        """``programs``: made by earlier sessions on the same bundle."""
        self.backend = backend
        self.manifest = backend.bundle.manifest
        self.samples: list[Sample] = []
        self._buffers = sample_buffers(self.manifest)
        self._kept = self._buffers[PREDICTION].resolve({"B": 1})[1]  # velocities of the last computed steps
        self._programs = programs or Programs(self.manifest)

    def admit(self, run: Run, conditions: Mapping[str, FloatArray]) -> Sample:
        """Start a run. ``conditions`` are the levels' inputs that stay the same, each for one sample, without B."""
        history = RunHistory(run.sigmas, run.first_step, scale=run.start_scale)
        sample = Sample(run, Trace.of(run, self.backend.name), history, rows=conditions)
        state = self._empty_state(sample)
        sample.rows = {**conditions, **state, LATENT: run.start(state[LATENT].shape, self._shape(run.sizes))}
        history.estimate = partial(self._estimate, sample)
        if self.manifest.coarse:
            sample.trace.complexity = Complexity(min(self.manifest.coarse))
        self.samples.append(sample)
        return sample

    def step(self) -> None:
        """One step of every sample that is not done."""
        for members in self.groups():
            self.advance(members)

    def groups(self) -> list[list[tuple[Sample, Decision]]]:
        """The samples that are not done with what they do next, those together that can share a call.

        Raises `StepError` when the gate fails.
        """
        self.run_gates()
        groups: defaultdict[tuple[int | None, bool, tuple[int, ...]], list[tuple[Sample, Decision]]] = defaultdict(list)
        for sample in self.samples:
            if not sample.done:
                decision = self._decide(sample)
                sizes = sample.run.scales[decision.scale]
                passes = sample.run.guided and decision.level is not None
                groups[decision.level, passes, tuple(sizes.values())].append((sample, decision))
        return list(groups.values())

    def advance(self, members: Sequence[tuple[Sample, Decision]]) -> None:
        """One step of samples of the same size at the same level. Raises `StepError` when an engine fails."""
        begin = perf_counter()
        samples, decisions = zip(*members, strict=True)
        for sample, decision in members:
            if decision.scale != sample.history.scale:
                self._grow(sample, decision)
        level, guided = decisions[0].level, samples[0].run.guided
        if level is None:
            program = self._programs.predicted
        else:
            program = self._programs.level(level, samples[0].sizes, guided=guided)
        with _losing(samples):
            workspace = self._gather(samples)
            results = workspace.run(program, self._inputs(members))
        milliseconds = (perf_counter() - begin) * 1000
        lost, kept = [], []
        for row, (sample, decision) in enumerate(members):
            own = {name: values[row] for name, values in results.items()}
            # whatever is not finite in the latent or the velocity is not in these, which are on the host anyway
            if all(np.isfinite(values).all() for values in own.values()):
                sample.history.record(decision, own[PREDICTION_ERROR], deviations(own))
                kept.append((sample, decision))
            else:
                lost.append(sample)
        for (sample, decision), found in zip(kept, _statistics([sample for sample, _ in kept]), strict=True):
            self._record(sample, decision, milliseconds, found)
        if lost:
            graph = PREDICT if level is None else self.manifest.level(level).graph
            raise self._not_finite(graph, lost)

    def _decide(self, sample: Sample) -> Decision:
        """What a sample's next step does: asked once a step, however often somebody asks for the groups."""
        policy = sample.run.policy
        if sample.decision is None or policy.timed:
            sample.decision = policy.decide(sample.history)
        return sample.decision

    def run_gates(self) -> None:
        """Find how much the next step will differ from the one before, for the samples whose policy looks at it.

        `groups` does so itself. Raises `StepError` when the gate fails.
        """
        waiting: defaultdict[object, list[Sample]] = defaultdict(list)
        for sample in self.samples:
            # once a step, however often somebody asks for the groups
            if sample.run.policy.gate and not sample.done and len(sample.history.changes) == len(sample.history.levels):
                # where their rows are: samples regroup for the step itself, not for this
                place = id(sample.place[0]) if sample.place else tuple(sample.sizes.values())
                waiting[place].append(sample)
        for samples in waiting.values():
            self._run_gate(samples[0].place[0] if samples[0].place else self._gather(samples), samples)

    def _run_gate(self, workspace: Workspace, samples: Sequence[Sample]) -> None:
        """Run the gate on all rows of a workspace; what it gives for other rows than these samples' means nothing."""
        sigmas = np.ones(workspace.sizes["B"], np.float32)
        rows = {sample.place[1]: sample for sample in samples if sample.place}
        for row, sample in rows.items():
            sigmas[row] = sample.told(self.manifest.sampler)
        assert self._programs.gate is not None
        with _losing(samples):
            results = workspace.run(self._programs.gate, {GATE_TIMESTEP: sigmas})
        lost = []
        for row, sample in rows.items():
            found = [float(results[name][row]) for name in GATE_CHANGES]
            if np.isfinite(found).all():
                sample.history.changes.append(Change(*found))
            else:
                lost.append(sample)
        if lost:
            raise self._not_finite(self._programs.gate.name, lost)

    def _not_finite(self, graph: str, samples: Sequence[Sample]) -> NotFiniteStepError:
        """What to raise for samples, of which the first names the step."""
        first = samples[0]
        where = f"step {first.history.step + 1} of {first.run.steps}"
        return NotFiniteStepError(not_finite(graph, where, self.manifest.graphs[graph].dtype), samples)

    def latent(self, sample: Sample) -> FloatArray:
        """A copy of a sample's latent (C, H, W) as it is now."""
        if sample.place is None:
            return sample.rows[LATENT].copy()
        workspace, row = sample.place
        return workspace.read(LATENT, row)

    def retire(self, sample: Sample) -> FloatArray:
        """Take a sample out, done or not, and return its latent (C, H, W)."""
        latent = self.latent(sample)
        self.samples.remove(sample)
        self._leave(sample)
        return latent

    def _empty_state(self, sample: Sample) -> dict[str, FloatArray]:
        """Zeros for everything that a step changes for the next one, by name, for one sample."""
        sizes = {**sample.sizes, "B": 1}
        state = self._programs.level(self.manifest.native, sample.sizes).state
        names = (*state, GATE_INPUT) if sample.run.policy.gate else state
        return {name: np.zeros(self._buffers[name].resolve(sizes)[1:], dtype=np.float32) for name in names}

    def _shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """A latent's shape (C, H, W)."""
        return self._buffers[LATENT].resolve({**sizes, "B": 1})[1:]

    def _estimate(self, sample: Sample) -> FloatArray | None:
        """x̂ = z − σ·v: what the last computed velocity leads to from the latent as it is now."""
        if sample.place is None or not sample.history.computed:
            return None
        workspace, row = sample.place
        estimate: FloatArray = (
            self.latent(sample) - sample.history.sigmas[sample.history.step] * workspace.read(VELOCITIES, row)[0]
        )
        return estimate

    def _grow(self, sample: Sample, decision: Decision) -> None:
        """Make a sample's latent as large as its next step needs it. Raises `StepError` when the engine fails."""
        run, history, small = sample.run, sample.history, self.latent(sample)
        sigma = history.sigmas[history.step]
        sample.history = history.grown(decision.scale, decision.gain)
        state = self._empty_state(sample)
        shape = state[LATENT].shape
        noise = noise_coefficients(run.seed, self._shape(run.sizes))[..., : shape[-2], : shape[-1]]
        inputs = {
            LATENT: in_corner(small, shape)[None],
            NOISE: noise[None],
            TIMESTEP: np.array([sigma], np.float32),
            GAIN: np.array([decision.gain], np.float32),
            **growing_tables(small.shape[-2:], shape[-2:]),
        }
        with _losing([sample]):
            latent = self.backend.engine(GROW).run(inputs)[NEXT + LATENT][0]
        if not np.isfinite(latent).all():
            raise self._not_finite(GROW, [sample])
        sample.rows = {**sample.rows, **state, LATENT: latent}
        sample.native_done = False
        self._leave(sample)
        if run.policy.gate:  # the step's own, so that the next one has something to compare with
            self._run_gate(self._gather([sample]), [sample])

    def _leave(self, sample: Sample) -> None:
        """Take a sample out of its workspace."""
        if sample.place is not None:
            workspace = sample.place[0]
            sample.place = None
            self._vacate(workspace)

    def _inputs(self, members: Sequence[tuple[Sample, Decision]]) -> dict[str, FloatArray]:
        """What is new at every step, a row a sample."""
        manifest, count = self.manifest, len(members)
        sigma, after = np.stack([sample.history.sigmas[sample.history.step :][:2] for sample, _ in members], axis=1)
        levels = [decision.level for _, decision in members]
        prediction = np.zeros((count, self._kept), np.float32)
        for row, (_, decision) in enumerate(members):
            prediction[row, : len(decision.prediction)] = decision.prediction
        inputs = {
            TIMESTEP: sigma,
            MODEL_TIMESTEP: np.array([sample.told(manifest.sampler) for sample, _ in members], np.float32),
            **self._solver(members, after - sigma),
            KEEP_ESTIMATE: np.array([level == manifest.native for level in levels], np.float32),
            KEEP_VELOCITY: np.array([level is not None for level in levels], np.float32),
            PREDICTION: prediction,
            CORRECTION: np.array([decision.correction for _, decision in members], np.float32),
        }
        if manifest.coarse:
            inputs[CARRY] = np.zeros((count, len(manifest.coarse)), np.float32)
            for row, (sample, decision) in enumerate(members):
                if decision.level in manifest.coarse and sample.native_done:
                    inputs[CARRY][row, manifest.coarse.index(decision.level)] = sample.run.carry
        return inputs

    def _solver(self, members: Sequence[tuple[Sample, Decision]], dt: FloatArray) -> dict[str, FloatArray]:
        """What tells the step graph how far to go."""
        sampler = self.manifest.sampler
        if sampler.kind != "flow_unipc":
            return {DT: dt}
        rows = [
            coefficients(sample.history.sigmas.tolist(), sample.history.step, sample.history.first, sampler.order)
            for sample, _ in members
        ]
        return {SOLVER: np.array(rows, np.float32)}

    def _gather(self, members: Sequence[Sample]) -> Workspace:
        """A workspace whose rows are these samples, in order; rows are copied only where samples have regrouped."""
        here = {id(sample.place[0]): sample.place[0] for sample in members if sample.place}
        if len(here) == 1:
            (workspace,) = here.values()
            rows = [sample.place[1] if sample.place else None for sample in members]
            if workspace.sizes["B"] == len(members) and rows == [*range(len(members))]:
                return workspace
        workspace = self.backend.workspace(self._buffers, {**members[0].sizes, "B": len(members)})
        for same in _neighbours(members):  # a GPU copies them in one piece
            (row, first), count = same[0], len(same)
            assert first.place is not None
            workspace.take(tuple(first.rows), row, *first.place, count)
        for row, sample in enumerate(members):
            if sample.place is None:
                for name, values in sample.rows.items():
                    workspace.write(name, row, values)
            sample.place = workspace, row
        for left in here.values():
            self._vacate(left)
        return workspace

    def _vacate(self, workspace: Workspace) -> None:
        """Give a workspace back that no sample is left in."""
        if not any(sample.place and sample.place[0] is workspace for sample in self.samples):
            self.backend.give_back(workspace)

    def _record(self, sample: Sample, decision: Decision, milliseconds: float, statistic: dict[int, float]) -> None:
        """Keep what a step did, which the history has: for the trace and for the complexity map."""
        run, history, manifest = sample.run, sample.history, self.manifest
        step = history.step - 1
        sample.decision = None
        sample.native_done |= decision.level == manifest.native
        # a difference across a switch shows how levels disagree, not what the picture does
        # and the map has the picture's size
        comparable = history.scale == 1 and len(set(history.levels[-DIFFERENCE_ORDER:])) == 1
        if history.deviations and comparable and sample.trace.complexity:
            patch = sample.trace.complexity.patch
            smooth = run.smooth[patch][step] if patch in run.smooth else 1.0
            sample.trace.complexity.add(step, history.deviations[patch] / smooth)
        sample.trace.steps.append(
            StepRecord(
                step=step,
                sigma=float(history.sigmas[step]),
                level=decision.level,
                milliseconds=milliseconds,
                statistic=statistic,
                error=root_mean_square(history.error) if decision.level and history.error is not None else None,
                by=decision.by,
                figures=dict(decision.figures),
                scale=float(history.scale),
                size=self._pixels(sample),
            )
        )

    def _pixels(self, sample: Sample) -> tuple[int, int]:
        """Height and width of the picture that a sample's latent is now."""
        size = shapes.to_size(self.manifest.latent, sample.sizes)
        return size.height, size.width


def _neighbours(members: Sequence[Sample]) -> list[list[tuple[int, Sample]]]:
    """Samples that have a place, with their new rows: those together that are one after another here and there."""

    def where(numbered: tuple[int, tuple[int, Sample]]) -> tuple[object, ...]:
        number, (row, sample) = numbered
        assert sample.place is not None
        source, source_row = sample.place
        return tuple(sample.rows), id(source), row - number, source_row - number

    placed = [(row, sample) for row, sample in enumerate(members) if sample.place]
    return [[one for _, one in same] for _, same in groupby(enumerate(placed), where)]


def _statistics(samples: Sequence[Sample]) -> list[dict[int, float]]:
    """σ_p after the last step of samples of one size, by coarse patch; empty until three steps are done."""
    found: list[dict[int, float]] = [{} for _ in samples]
    alike: defaultdict[float, list[int]] = defaultdict(list)
    for row, sample in enumerate(samples):
        if sample.history.deviations:
            alike[sample.run.policy.quantile() or sample.run.rho].append(row)
    for rho, rows in alike.items():
        for patch in samples[rows[0]].history.deviations:
            values = np.stack([samples[row].history.deviations[patch] for row in rows])
            for row, value in zip(rows, statistics(values, rho), strict=True):
                found[row][patch] = float(value)
    return found


@contextmanager
def _losing(samples: Sequence[Sample]) -> Iterator[None]:
    """Say of an engine's failure which samples it cost."""
    try:
        yield
    except StepError:
        raise
    except BackendError as error:
        raise StepError(str(error), samples) from error
