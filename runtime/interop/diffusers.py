"""A bundle behind a diffusers pipeline of FLUX.1: its loop, callbacks and scheduler, our engines and schedule.

    from diffusers import FluxPipeline
    from ddit.runtime.interop.diffusers import DDiTTransformer

    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", transformer=None)
    pipe.transformer = DDiTTransformer.open("flux.bundle", pipe.scheduler)
    pipe("a zebra in fog").images[0].save("zebra.png")

The pipeline calls its transformer at every step and moves the latent itself. So what is given back is the velocity that
takes the latent where our step graph takes it: a predicted one, with carried detail, corrected. The step graph keeps
its state over the steps of a run; a run begins where the noise level does not fall.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddit.runtime import shapes
from ddit.runtime.backends.base import Backend
from ddit.runtime.backends.registry import open_backend
from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.names import LATENT
from ddit.runtime.conditioning.guidance import guidance_inputs
from ddit.runtime.errors import UsageError
from ddit.runtime.policies.settings import bundle_policy, smooth_curves
from ddit.runtime.request import DEFAULT_SCHEDULE, Request, Run
from ddit.runtime.session import Sample, Session
from ddit.runtime.step import Programs
from ddit.runtime.trace import Trace

FloatArray = NDArray[np.float32]

PROMPT = "given to diffusers"  # in traces: what comes here is what the text encoders made of it
NEAR = 1e-3  # noise levels that are the same, in whatever type a pipeline computes


@dataclass(eq=False)
class DDiTTransformer:
    """What a pipeline takes for its transformer. Belongs to one thread, as a diffusers pipeline does."""

    backend: Backend
    scheduler: Any  # the pipeline's: a step's end is the next one's noise level, which a transformer is not told
    schedule: str = DEFAULT_SCHEDULE
    traces: list[Trace] = field(default_factory=list)  # what the latest run did, picture by picture
    _session: Session | None = None
    _samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        manifest = self.backend.bundle.manifest
        if manifest.latent.has_frames or manifest.guidance.two_passes:
            raise UsageError(f"a {manifest.family} bundle cannot stand in for FLUX.1's transformer; use ddit-run")
        self._programs = Programs(manifest)
        # what pipelines ask of a transformer
        self.config = SimpleNamespace(
            in_channels=manifest.latent.channels * manifest.native**2, guidance_embeds=manifest.guidance.embedded
        )

    @classmethod
    def open(
        cls,
        path: Path | str,
        scheduler: Any,
        *,
        schedule: str = DEFAULT_SCHEDULE,
        backend: str | None = None,
        threads: int | None = None,
    ) -> "DDiTTransformer":
        """Open a bundle's folder for a pipeline with this scheduler.

        Args:
            schedule: a policy in writing, as for ``ddit-run generate``; all but progressive ones.
            backend, threads: as for `ddit.runtime.Pipeline.open`.

        Raises:
            BundleError, BackendError, UsageError: the bundle is damaged, is no FLUX.1, or cannot run here.
        """
        return cls(open_backend(backend, Bundle.open(path), threads), scheduler, schedule)

    @property
    def dtype(self) -> Any:
        """float32, which is what goes in and out."""
        import torch

        return torch.float32

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """diffusers' name for a pass of the model. Raises `UsageError` for a second one."""
        if name != "cond":
            raise UsageError("a second pass (true_cfg_scale) is not supported; leave the negative prompt out")
        yield

    def __call__(
        self,
        hidden_states: Any,
        timestep: Any,
        encoder_hidden_states: Any,
        pooled_projections: Any,
        img_ids: Any,
        txt_ids: Any = None,
        guidance: Any = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """The velocity (B, S, C·p·p) of packed latents, as diffusers' `FluxTransformer2DModel` gives it.

        The arguments are that model's. Raises `UsageError` for others that mean something, as ControlNet's.
        """
        import torch
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        if odd := [name for name, value in others.items() if value]:
            raise UsageError(f"{odd[0]} is not supported by a bundle; leave it out")
        rows, columns = (int(count) + 1 for count in img_ids.amax(dim=0)[1:3])
        latents = self._unpacked(_array(hidden_states), rows, columns)
        conditions = {"context": _array(encoder_hidden_states), "pooled": _array(pooled_projections)}
        scales = None if guidance is None else _array(guidance)
        velocities = self._step(latents, float(timestep.flatten()[0]), conditions, scales)
        packed = torch.from_numpy(self._packed(velocities)).to(hidden_states)
        return Transformer2DModelOutput(sample=packed) if return_dict else (packed,)

    def _step(
        self, latents: FloatArray, sigma: float, conditions: Mapping[str, FloatArray], scales: FloatArray | None
    ) -> FloatArray:
        """One step of every picture from these latents (B, C, H, W): by which velocity the latents are to move."""
        if not self._goes_on(latents, sigma):
            self._begin(latents, sigma, conditions, scales)
        assert self._session is not None
        for sample, latent in zip(self._samples, latents, strict=True):
            if sample.place is None:
                sample.rows = {**sample.rows, LATENT: latent}
            else:
                workspace, row = sample.place
                workspace.write(LATENT, row, latent)
        now, after = self._samples[0].history.sigmas[self._samples[0].history.step :][:2]
        self._session.step()
        moved = np.stack([self._session.latent(sample) for sample in self._samples])
        if self._samples[0].done:
            self._end()
        velocities: FloatArray = (moved - latents) / (after - now)
        return velocities

    def _end(self) -> None:
        """Give back what the run in flight holds; the next one of its size finds its engines bound."""
        if self._session is not None:
            for sample in [*self._session.samples]:
                self._session.retire(sample)
        self._session, self._samples = None, []

    def _goes_on(self, latents: FloatArray, sigma: float) -> bool:
        """Whether these latents are those of the next step of the run in flight."""
        if self._session is None or len(self._samples) != len(latents):
            return False
        first = self._samples[0]
        if self._session.latent(first).shape != latents[0].shape:
            return False
        return abs(float(first.history.sigmas[first.history.step]) - sigma) < NEAR

    def _begin(
        self, latents: FloatArray, sigma: float, conditions: Mapping[str, FloatArray], scales: FloatArray | None
    ) -> None:
        """Start a run at a noise level of the pipeline's scheduler; one in flight was given up."""
        self._end()
        sigmas = np.asarray(_array(self.scheduler.sigmas), np.float32)
        first = int(np.argmin(np.abs(sigmas[:-1] - sigma)))
        if abs(float(sigmas[first]) - sigma) > NEAR:
            raise UsageError(
                f"the noise level {sigma:.3f} is none of the scheduler's; open the transformer with the pipeline's own"
            )
        session = Session(self.backend, self._programs)
        text_length = conditions["context"].shape[1]
        self._samples = []
        for row, latent in enumerate(latents):
            scale = None if scales is None else float(scales[row])
            run = self._run(latent, sigmas, first, scale, text_length)
            own = {name: values[row] for name, values in conditions.items()}
            own |= guidance_inputs(self.backend.bundle.manifest.guidance, run.guidance)
            self._samples.append(session.admit(run, own))
        self._session, self.traces = session, [sample.trace for sample in self._samples]

    def _run(self, latent: FloatArray, sigmas: FloatArray, first: int, scale: float | None, text_length: int) -> Run:
        """One picture's run on the scheduler's noise levels."""
        manifest, backend = self.backend.bundle.manifest, str(self.backend)
        size = shapes.to_size(manifest.latent, {"H": latent.shape[1], "W": latent.shape[2]})
        policy = bundle_policy(self.schedule, manifest, sigmas, size=size, backend=backend)
        if len(policy.scales()) > 1:
            raise UsageError(
                f"{policy} makes the latent grow, which a diffusers pipeline does not know; choose another"
            )
        request = Request(
            prompt=PROMPT,
            steps=len(sigmas) - 1,
            schedule=policy,
            height=size.height,
            width=size.width,
            guidance=scale,
            text_length=text_length,
            latent=latent,
            first_step=first,
        )
        smooth = smooth_curves(manifest, sigmas, size=size, backend=backend)
        return replace(request.resolve(manifest, backend), sigmas=sigmas, timesteps=sigmas[:-1], smooth=smooth)

    def _unpacked(self, packed: FloatArray, rows: int, columns: int) -> FloatArray:
        """Tokens (B, S, C·p·p) as the pipeline packs them → (B, C, rows·p, columns·p)."""
        patch = self.backend.bundle.manifest.native
        grid = packed.reshape(len(packed), rows, columns, -1, patch, patch)
        return np.ascontiguousarray(
            grid.transpose(0, 3, 1, 4, 2, 5).reshape(len(packed), -1, rows * patch, columns * patch)
        )

    def _packed(self, latents: FloatArray) -> FloatArray:
        """The inverse of `_unpacked`."""
        patch = self.backend.bundle.manifest.native
        count, channels, height, width = latents.shape
        grid = latents.reshape(count, channels, height // patch, patch, width // patch, patch)
        return np.ascontiguousarray(
            grid.transpose(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * patch * patch), dtype=np.float32
        )


def _array(tensor: Any) -> FloatArray:
    """A torch tensor on the host, float32."""
    values: FloatArray = tensor.detach().float().cpu().numpy()
    return values
