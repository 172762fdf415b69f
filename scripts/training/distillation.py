"""Distilling coarse levels from the frozen native one: ‖v_coarse − v_native‖² (DDiT, arXiv 2602.16968).

The teacher is the base model at its native patch. Teacher and students share one copy of its weights; what is trained
are the students' own parameters (`Level.own_parameters`), always in float32.

Where a model is guided by two passes, with the prompt and with a negative one, both are distilled: a level whose passes
are the teacher's is the teacher under every guidance scale.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddit.exporter.adapter import Adapter
from ddit.exporter.levels import Level
from ddit.exporter.steps.patches import per_sample
from ddit.runtime import shapes
from ddit.runtime.bundle.manifest import LatentInfo, RotaryInfo
from ddit.runtime.conditioning import positions as runtime_positions
from training.loop import Training

Tables = Callable[[int, Sequence[int]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class States:
    """A batch of noisy latents and the levels' other inputs."""

    latent: Tensor  # (B, C, …, H, W) float32
    timestep: Tensor  # (B,) noise levels, as the levels are told them
    text: Mapping[str, Tensor]  # the levels' inputs that prompts feed, by name; B rows
    guidance: Tensor | None  # (B,) scales; None for a model that takes none
    negative: Mapping[str, Tensor] | None = None  # the same as text of the negative prompt: guidance by two passes

    def passes(self) -> list[dict[str, Tensor]]:
        """The inputs of a level's every pass, but for its tables: with the prompt, then with the negative one."""
        common = {"latent": self.latent, "timestep": self.timestep}
        if self.negative is not None:
            return [{**common, **self.text}, {**common, **self.negative}]
        return [{**common, **self.text, **({} if self.guidance is None else {"guidance": self.guidance})}]

    def velocity(self, found: Sequence[Tensor]) -> Tensor:
        """What a sampler moves by, from the velocities (B, C, …, H, W) of all passes: v₋ + s (v₊ − v₋) of two."""
        if self.negative is None:
            return found[0]
        assert self.guidance is not None
        positive, negative = found
        return negative + per_sample(self.guidance, negative) * (positive - negative)


@dataclass(frozen=True)
class Means:
    """How much more than other errors those count that a whole patch, or the whole picture, has in common.

    They are a small part of the squared error, but a run adds them up, step after step: backgrounds change their hue.
    """

    patch: float = 0.0
    picture: float = 0.0

    def loss(self, error: Tensor, patch: int) -> Tensor:
        """What errors (B, C, …, H, W) of the velocity cost beside their mean square. A clip's frames are pictures."""
        of_patches, of_pictures = F.avg_pool2d(error.flatten(0, -4), patch), error.mean((-2, -1))
        return self.patch * of_patches.square().mean() + self.picture * of_pictures.square().mean()


def level_tables(positions: RotaryInfo, latent: LatentInfo, native: int, device: torch.device) -> Tables:
    """Gives the tables of a level, by its patch, for a latent's size along its axes; made once, on the device."""

    @cache
    def tables(patch: int, size: Sequence[int]) -> dict[str, Tensor]:
        symbols = {shapes.SYMBOLS[axis.name]: side for axis, side in zip(latent.axes, size, strict=True)}
        arrays = runtime_positions.level_tables(positions, latent, native, patch, symbols)
        return {name: torch.from_numpy(values).to(device) for name, values in arrays.items()}

    return tables


class Distillation:
    """Coarse levels in training, beside the native level that teaches them."""

    def __init__(
        self,
        run: Training,
        teacher: Level,
        levels: Mapping[int, Level],
        tables: Tables,
        *,
        checkpointing: bool = False,
        resize: bool = True,
        start: Adapter | None = None,
        means: Means | None = None,
    ):
        """``teacher``: the native level; ``levels``: the coarse ones over the same transformer, by patch.

        ``checkpointing``: recompute activations and run passes in turn, to save memory; else a state's two passes are
        one batch, which starts half as many kernels. ``means``: errors that count more than others.
        ``resize``: patch embeddings and heads start as resized native ones, not at random. ``start``: the adapter to
        start from; raises `AdapterError` where it does not fit.
        """
        teacher.requires_grad_(False)
        self.run, self.teacher, self.levels, self.means = run, teacher, levels, means or Means()
        for patch, coarse in levels.items():
            if not resize:
                coarse.embed.reset_parameters()
                coarse.head.reset_parameters()
            if start is not None:
                start.apply(coarse, patch)
        self.groups = [{"params": list(level.own_parameters().values())} for level in self.levels.values()]
        self.own = nn.ParameterList([parameter for group in self.groups for parameter in group["params"]])
        for parameter in self.own:
            parameter.data = parameter.data.float()
        run.start_together(self.own)

        self._tables, self._in_turn = tables, checkpointing
        for level in (teacher, *levels.values()):
            level.checkpointing = checkpointing
            run.compile_blocks(level.trunk)

    def _velocity(self, level: Level, inputs: Mapping[str, Tensor]) -> Tensor:
        with self.run.autocast():
            velocity: Tensor = level(**inputs, **self._tables(level.patch, inputs["latent"].shape[2:]))
        return velocity

    def backward(self, states: States, share: float = 1.0) -> dict[int, Tensor]:
        """Add the gradient of every level's error to its own parameters; returns what every level moves a sampler by.

        Those are velocities (B, C, …, H, W) by patch, the teacher's first. ``share`` is the weight of this batch in the
        optimiser's step. The losses in the report are divided by the variance of the teacher's velocity.
        """
        passes = states.passes()
        batches = passes if self._in_turn else [joined(passes)]
        with torch.no_grad():
            targets = [self._velocity(self.teacher, inputs) for inputs in batches]
            of_passes = torch.cat(targets).chunk(len(passes))
            variance = torch.stack([target.var() for target in of_passes]).mean()
        velocities = {self.teacher.patch: states.velocity(of_passes)}
        for patch, level in self.levels.items():
            found, losses = [], []
            for inputs, target in zip(batches, targets, strict=True):
                velocity = self._velocity(level, inputs)
                error = velocity - target
                loss = error.square().mean()
                # level by level and batch by batch: the next one's activations take the place of this one's
                torch.autograd.backward(share / len(batches) * (loss + self.means.loss(error, patch)))
                found.append(velocity.detach())
                losses.append(loss.detach())
            self.run.note(f"level {patch}", torch.stack(losses).mean() / variance)
            velocities[patch] = states.velocity(torch.cat(found).chunk(len(passes)))
        return velocities


def joined(passes: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The inputs of several passes as those of one, with as many times its rows."""
    return {name: torch.cat([inputs[name] for inputs in passes]) for name in passes[0]}
