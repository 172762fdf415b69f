"""Runs whose loop and solver are somebody else's: our engines and schedule say by which velocity a latent is to move.

Whoever has the loop moves the latent itself. So what is given is the velocity that takes the latent where our step
graph takes it: a predicted one, with carried detail, corrected. The step graph keeps its state over the steps of a run;
a run begins where a noise level is not the one after the last.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ddit.runtime import shapes
from ddit.runtime.backends.base import Backend
from ddit.runtime.bundle.names import ESTIMATES, LATENT
from ddit.runtime.conditioning.guidance import guidance_inputs
from ddit.runtime.errors import UsageError
from ddit.runtime.policies.settings import bundle_policy, smooth_curves
from ddit.runtime.request import Request, Run
from ddit.runtime.samplers.sigmas import BELOW_ONE
from ddit.runtime.samplers.unipc import coefficients
from ddit.runtime.session import Sample, Session
from ddit.runtime.step import Programs
from ddit.runtime.trace import Trace

FloatArray = NDArray[np.float32]

PROMPT = "given to diffusers"  # in traces: what comes here is what the text encoders made of it
NEAR = 5e-4  # noise levels that are the same: what a model is told may be cut to thousandths


@dataclass(frozen=True)
class Levels:
    """The noise levels of somebody's run."""

    sigmas: FloatArray  # one more than there are steps; the last is 0
    told: FloatArray  # what the model is told of them
    solver: int = 0  # order of the UniPC solver that moves the latent; 0: another one does


@dataclass(eq=False)
class BorrowedLoop:
    """The samples of a loop that is somebody else's. Belongs to one thread."""

    backend: Backend
    schedule: str
    traces: list[Trace] = field(default_factory=list)  # what the latest run did, sample by sample
    _session: Session | None = None
    _samples: list[Sample] = field(default_factory=list)
    _solver: int = 0
    _given: list[FloatArray] = field(default_factory=list)  # the solver's estimates of its last steps, newest first

    def __post_init__(self) -> None:
        self._programs = Programs(self.backend.bundle.manifest)

    def step(
        self,
        latents: FloatArray,
        told: float,
        levels: Levels,
        conditions: Mapping[str, FloatArray],
        scales: FloatArray | None,
    ) -> FloatArray:
        """One step of every sample from these latents (B, C, …): by which velocity they are to move.

        Args:
            told: the noise level as the model is told it.
            levels: all of the run's; looked at where one begins.
            conditions: the levels' inputs that text feeds, a row a sample.
            scales: (B,) guidance scales; None where the model has none.
        """
        if not self._goes_on(latents, told):
            self._begin(latents, told, levels, conditions, scales)
        assert self._session is not None
        for sample, latent in zip(self._samples, latents, strict=True):
            if sample.place is None:
                sample.rows = {**sample.rows, LATENT: latent}
            else:
                workspace, row = sample.place
                workspace.write(LATENT, row, latent)
        history = self._samples[0].history
        step, first, sigmas = history.step, history.first, history.sigmas
        self._session.step()
        moved = np.stack([self._session.latent(sample) for sample in self._samples])
        velocities = self._velocities(latents, moved, sigmas, step, first)
        if self._samples[0].done:
            self.end()
        return velocities

    def end(self) -> None:
        """Give back what the run in flight holds; the next one of its size finds its engines bound."""
        if self._session is not None:
            for sample in [*self._session.samples]:
                self._session.retire(sample)
        self._session, self._samples, self._given = None, [], []

    def _velocities(
        self, latents: FloatArray, moved: FloatArray, sigmas: FloatArray, step: int, first: int
    ) -> FloatArray:
        """The velocities with which the loop's solver moves the latents as our step graph has."""
        sampler = self.backend.bundle.manifest.sampler
        velocities: FloatArray
        if sampler.kind != "flow_unipc":
            velocities = (moved - latents) / (sigmas[step + 1] - sigmas[step])
            return velocities
        if self._solver == sampler.order:
            # Δ = Σ b·(x̂ − z) over the newest estimate, which is looked for, and those that the solver was given
            newest, *others = np.array(coefficients(sigmas.tolist(), step, first, sampler.order), np.float32)
            known = sum(b * (given - latents) for b, given in zip(others, self._given, strict=False))
            estimates = latents + (moved - latents - known) / newest
        else:
            places = [sample.place for sample in self._samples]
            estimates = np.stack([place[0].read(ESTIMATES, place[1])[0] for place in places if place])
        self._given = [estimates, *self._given][: sampler.order]
        velocities = (latents - estimates) / sigmas[step]
        return velocities

    def _goes_on(self, latents: FloatArray, told: float) -> bool:
        """Whether these latents are those of the next step of the run in flight."""
        if self._session is None or len(self._samples) != len(latents):
            return False
        first = self._samples[0]
        if self._session.latent(first).shape != latents[0].shape:
            return False
        return abs(float(first.run.timesteps[first.history.step]) - told) < NEAR

    def _begin(
        self,
        latents: FloatArray,
        told: float,
        levels: Levels,
        conditions: Mapping[str, FloatArray],
        scales: FloatArray | None,
    ) -> None:
        """Start a run at a noise level; one in flight was given up."""
        self.end()
        first = int(np.argmin(np.abs(levels.told - told)))
        if abs(float(levels.told[first]) - told) > NEAR:
            raise UsageError(
                f"the noise level {told:.3f} is none of the scheduler's; open the transformer with the pipeline's own"
            )
        if self.backend.bundle.manifest.sampler.kind == "flow_unipc":  # other solvers begin at 1
            levels = replace(levels, sigmas=np.minimum(levels.sigmas, np.float32(1 - BELOW_ONE)))
        session = Session(self.backend, self._programs)
        text_length = next(iter(conditions.values())).shape[1]
        for row, latent in enumerate(latents):
            scale = None if scales is None else float(scales[row])
            run = self._run(latent, levels, first, scale, text_length)
            own = {name: values[row] for name, values in conditions.items()}
            own |= guidance_inputs(self.backend.bundle.manifest.guidance, run.guidance)
            self._samples.append(session.admit(run, own))
        self._session, self._solver, self.traces = session, levels.solver, [one.trace for one in self._samples]

    def _run(self, latent: FloatArray, levels: Levels, first: int, scale: float | None, text_length: int) -> Run:
        """One sample's run."""
        manifest, backend = self.backend.bundle.manifest, str(self.backend)
        symbols = dict(zip(manifest.latent.patch_grid(1), latent.shape[1:], strict=True))
        size = shapes.to_size(manifest.latent, symbols)
        policy = bundle_policy(self.schedule, manifest, levels.sigmas, size=size, backend=backend)
        if len(policy.scales()) > 1:
            raise UsageError(
                f"{policy} makes the latent grow, which a diffusers pipeline does not know; choose another"
            )
        request = Request(
            prompt=PROMPT,
            steps=len(levels.sigmas) - 1,
            schedule=policy,
            height=size.height,
            width=size.width,
            frames=size.frames,
            guidance=scale,
            text_length=text_length,
            latent=latent,
            first_step=first,
        )
        smooth = smooth_curves(manifest, levels.sigmas, size=size, backend=backend)
        run = request.resolve(manifest, backend)
        return replace(run, sigmas=levels.sigmas, timesteps=levels.told, smooth=smooth)
