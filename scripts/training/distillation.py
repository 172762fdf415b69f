"""Distilling coarse levels from the frozen native one: ‖v_coarse − v_native‖² (DDiT, arXiv 2602.16968).

The teacher is the base model at its native patch. Teacher and students share one copy of its weights; what is trained
are the students' own parameters (`Level.own_parameters`), always in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from ddit.exporter.adapter import Adapter
from ddit.exporter.families.flux.model import rotary_positions
from ddit.exporter.families.flux.modules import NATIVE_PATCH, FluxLevel
from ddit.exporter.levels import AdapterConfig, Level
from ddit.runtime.conditioning.positions import rotary_tables
from training.loop import Training


@dataclass(frozen=True)
class States:
    """A batch of noisy latents and the transformer's other inputs."""

    latent: Tensor  # (B, C, H, W) float32
    sigma: Tensor  # (B,) noise levels
    guidance: Tensor | None  # (B,); None for a model without guidance embedding
    context: Tensor  # (B, L, Dc)
    pooled: Tensor  # (B, Dp)


@dataclass(frozen=True)
class Means:
    """How much more than other errors those count that a whole patch, or the whole picture, has in common.

    They are a small part of the squared error, but a run adds them up, step after step: backgrounds change their hue.
    """

    patch: float = 0.0
    picture: float = 0.0

    def loss(self, error: Tensor, patch: int) -> Tensor:
        """What errors (B, C, H, W) of the velocity cost beside their mean square."""
        of_patches, of_pictures = F.avg_pool2d(error, patch), error.mean((2, 3))
        return self.patch * of_patches.square().mean() + self.picture * of_pictures.square().mean()


def level_tables(transformer: FluxTransformer2DModel, patch: int, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A level's rotary tables, on the transformer's device, for latents of a height and width."""
    grid = {name: side // patch for name, side in zip(("height", "width"), size, strict=True)}
    positions = rotary_positions(transformer.config.axes_dims_rope)
    cos, sin = rotary_tables(positions, grid, patch / NATIVE_PATCH)
    return torch.from_numpy(cos).to(transformer.device), torch.from_numpy(sin).to(transformer.device)


class Distillation:
    """Coarse levels in training, beside the native level that teaches them."""

    def __init__(
        self,
        run: Training,
        transformer: FluxTransformer2DModel,
        patches: Sequence[int],
        config: AdapterConfig,
        *,
        checkpointing: bool = False,
        resize: bool = True,
        start: Adapter | None = None,
        means: Means | None = None,
    ):
        """``checkpointing``: recompute activations, to save memory. ``means``: errors that count more than others.

        ``resize``: patch embeddings and heads start as resized native ones, not at random. ``start``: the adapter to
        start from; raises `AdapterError` where it does not fit.
        """
        transformer.requires_grad_(False)
        self.run, self.means = run, means or Means()
        levels = {patch: FluxLevel(transformer, patch, config) for patch in patches}
        for patch, coarse in levels.items():
            if not resize:
                coarse.embed.reset_parameters()
                coarse.head.reset_parameters()
            if start is not None:
                start.apply(coarse, patch)
        self.levels: dict[int, Level] = {**levels}
        self.groups = [{"params": list(level.own_parameters().values())} for level in self.levels.values()]
        self.own = nn.ParameterList([parameter for group in self.groups for parameter in group["params"]])
        for parameter in self.own:
            parameter.data = parameter.data.float()
        run.start_together(self.own)

        self._all = {NATIVE_PATCH: FluxLevel(transformer, NATIVE_PATCH), **self.levels}
        self._rotary = cache(partial(level_tables, transformer))  # by patch and latent size
        for level in self._all.values():
            level.checkpointing = checkpointing
            run.compile_blocks(level.trunk)

    def _velocity(self, patch: int, states: States) -> Tensor:
        with self.run.autocast():
            velocity: Tensor = self._all[patch](
                states.latent,
                states.sigma,
                states.context,
                states.pooled,
                *self._rotary(patch, states.latent.shape[2:]),
                states.guidance,
            )
        return velocity

    def backward(self, states: States, share: float = 1.0) -> dict[int, Tensor]:
        """Add the gradient of every level's error to its own parameters; returns all levels' velocities (B, C, H, W).

        ``share`` is the weight of this batch in the optimiser's step. The losses in the report are divided by the
        variance of the teacher's velocity.
        """
        with torch.no_grad():
            target = self._velocity(NATIVE_PATCH, states)
            variance = target.var()
        velocities = {NATIVE_PATCH: target}
        for patch in self.levels:
            velocity = self._velocity(patch, states)
            error = velocity - target
            loss = error.square().mean()
            # level by level: the next one's activations take the place of this one's
            torch.autograd.backward(share * (loss + self.means.loss(error, patch)))
            self.run.note(f"level {patch}", loss / variance)
            velocities[patch] = velocity.detach()
        return velocities
