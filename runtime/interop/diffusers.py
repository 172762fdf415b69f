"""A bundle behind a diffusers pipeline of FLUX.1 or Wan 2.1: its loop and scheduler, our engines and schedule.

    from diffusers import FluxPipeline
    from ddit.runtime.interop.diffusers import DDiTTransformer

    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", transformer=None)
    pipe.transformer = DDiTTransformer.open("flux.bundle", pipe.scheduler)
    pipe("a zebra in fog").images[0].save("zebra.png")

A model that is guided by two passes is told by the pipeline which pass it is, but not how strongly they count: it is
opened with the pipeline itself.

    pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", transformer=None)
    pipe.transformer = DDiTTransformer.open("wan.bundle", pipe)
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ddit.runtime.backends.base import Backend
from ddit.runtime.backends.registry import open_backend
from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.names import NEGATIVE
from ddit.runtime.errors import UsageError
from ddit.runtime.interop.borrowed import BorrowedLoop, FloatArray, Levels
from ddit.runtime.request import DEFAULT_SCHEDULE
from ddit.runtime.trace import Trace

CONDITIONAL, UNCONDITIONAL = "cond", "uncond"  # diffusers' names of the two passes
UNIPC = "UniPCMultistepScheduler"


class DDiTTransformer(ABC):
    """What a pipeline takes for its transformer. Belongs to one thread, as a diffusers pipeline does."""

    def __init__(self, backend: Backend, pipeline: Any, schedule: str):
        """Use `open`."""
        self.backend = backend
        self._pipeline = pipeline  # or its scheduler: a transformer is not told the noise levels to come
        self._loop = BorrowedLoop(backend, schedule)
        self._pass = CONDITIONAL  # which one is called

    @classmethod
    def open(
        cls,
        path: Path | str,
        pipeline: Any,
        *,
        schedule: str = DEFAULT_SCHEDULE,
        backend: str | None = None,
        threads: int | None = None,
    ) -> "DDiTTransformer":
        """Open a bundle's folder for a pipeline.

        Args:
            pipeline: the pipeline, or its scheduler, which is enough for a model that is not guided by two passes.
            schedule: a policy in writing, as for ``ddit-run generate``; all but progressive ones.
            backend, threads: as for `ddit.runtime.Pipeline.open`.

        Raises:
            BundleError, BackendError, UsageError: the bundle is damaged, is for another pipeline, or cannot run here.
        """
        opened = Bundle.open(path)
        manifest = opened.manifest
        kind = WanTransformer if manifest.guidance.two_passes else FluxTransformer
        if hasattr(pipeline, "scheduler"):
            clips = hasattr(pipeline, "vae_scale_factor_temporal")
            if clips != manifest.latent.has_frames:
                raise UsageError(
                    f"a {manifest.family} bundle cannot stand in for the transformer of {type(pipeline).__name__}; "
                    "use ddit-run"
                )
        elif manifest.guidance.two_passes:
            raise UsageError(
                "this bundle's model is guided by two passes, and their scale is the pipeline's: "
                "give DDiTTransformer.open the pipeline itself, not its scheduler"
            )
        return kind(open_backend(backend, opened, threads), pipeline, schedule)

    @property
    def traces(self) -> list[Trace]:
        """What the latest run did, sample by sample."""
        return self._loop.traces

    @property
    def dtype(self) -> Any:
        """float32, which is what goes in and out."""
        import torch

        return torch.float32

    @property
    @abstractmethod
    def config(self) -> SimpleNamespace:
        """What pipelines ask of a transformer's configuration."""

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """diffusers' name for a pass of the model."""
        self._pass = name
        yield

    def _levels(self) -> Levels:
        """Those of the run that the scheduler is set to."""
        scheduler = getattr(self._pipeline, "scheduler", self._pipeline)
        told = _array(scheduler.timesteps) / scheduler.config.num_train_timesteps
        order = scheduler.config.solver_order if type(scheduler).__name__ == UNIPC else 0
        return Levels(_array(scheduler.sigmas), told, order)


class FluxTransformer(DDiTTransformer):
    """In the place of diffusers' `FluxTransformer2DModel`."""

    @property
    def config(self) -> SimpleNamespace:
        """Channels of a token, and whether the guidance scale is an input."""
        manifest = self.backend.bundle.manifest
        return SimpleNamespace(
            in_channels=manifest.latent.channels * manifest.native**2, guidance_embeds=manifest.guidance.embedded
        )

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
        """The velocity (B, S, C·p·p) of packed latents, as diffusers' model gives it.

        The arguments are that model's. Raises `UsageError` for others that mean something, as ControlNet's.
        """
        import torch
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        _refuse(others)
        if self._pass != CONDITIONAL:
            raise UsageError("a second pass (true_cfg_scale) is not supported; leave the negative prompt out")
        rows, columns = (int(count) + 1 for count in img_ids.amax(dim=0)[1:3])
        velocities = self._loop.step(
            self._unpacked(_array(hidden_states), rows, columns),
            float(timestep.flatten()[0]),
            self._levels(),
            {"context": _array(encoder_hidden_states), "pooled": _array(pooled_projections)},
            None if guidance is None else _array(guidance),
        )
        packed = torch.from_numpy(self._packed(velocities)).to(hidden_states)
        return Transformer2DModelOutput(sample=packed) if return_dict else (packed,)

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


class WanTransformer(DDiTTransformer):
    """In the place of diffusers' `WanTransformer3DModel`.

    With guidance s above 1 a pipeline calls it twice a step and moves along v₋ + s·(v₊ − v₋). A step has to be decided
    on once, with the text of both passes. So the first call gives v₊ = 0, and the second, which runs both passes of our
    level, v₋ = v / (1 − s): together they are the guided velocity v.
    """

    _text: FloatArray | None = None  # of the pass with the prompt, until the other one is called

    @property
    def config(self) -> SimpleNamespace:
        """Channels of the latent and the native patch."""
        manifest = self.backend.bundle.manifest
        return SimpleNamespace(in_channels=manifest.latent.channels, patch_size=(1, manifest.native, manifest.native))

    def __call__(
        self,
        hidden_states: Any,
        timestep: Any,
        encoder_hidden_states: Any,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """The velocity of latents (B, C, F, H, W), so that the pipeline's guidance makes ours of both passes'.

        The arguments are those of diffusers' model. Raises `UsageError` for others that mean something, as images'.
        """
        import torch
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        _refuse(others)
        if timestep.ndim > 1:
            raise UsageError("a noise level for every token (Wan 2.2) is not supported; use a Wan 2.1 pipeline")
        told = float(timestep[0]) / self._pipeline.scheduler.config.num_train_timesteps
        latents, text = _array(hidden_states), _array(encoder_hidden_states)
        scale = float(self._pipeline.guidance_scale)
        if scale > 1 and self._pass == CONDITIONAL:
            self._text, velocities = text, np.zeros_like(latents)
        else:
            conditions, share = {"context": text}, 1.0
            if scale > 1:
                assert self._text is not None
                conditions, share = {"context": self._text, NEGATIVE + "context": text}, 1 - scale
            scales = np.full(len(latents), scale, np.float32)
            velocities = self._loop.step(latents, told, self._levels(), conditions, scales) / np.float32(share)
        found = torch.from_numpy(velocities).to(hidden_states)
        return Transformer2DModelOutput(sample=found) if return_dict else (found,)


def _refuse(others: dict[str, Any]) -> None:
    """Raise `UsageError` for an argument of a transformer that means something."""
    if odd := [name for name, value in others.items() if value is not None and value is not False and value != {}]:
        raise UsageError(f"{odd[0]} is not supported by a bundle; leave it out")


def _array(tensor: Any) -> FloatArray:
    """A torch tensor on the host, float32."""
    values: FloatArray = tensor.detach().float().cpu().numpy()
    return values
