"""Where the noisy latents come from that coarse levels are trained on.

`Trajectories` are the states that a sampler goes through. The teacher's velocity at a state is the target there, and it
also leads to the next state, so a trajectory costs no extra call of the model. `Noised` are latents of pictures with
noise: z = (1 − σ) x + σ noise. Trajectories may start from such, too.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ddit.exporter.families.flux.modules import NATIVE_PATCH
from ddit.runtime.bundle.manifest import FlowMatchEulerInfo
from ddit.runtime.samplers.sigmas import sigmas
from training.distillation import States
from training.encoding import Rows

POOL_BATCHES, POOL_LEAST = 8, 64  # size of the pool: 8 batches, but at least 64 trajectories


class StateSource(Protocol):
    """Gives states to train on, again and again."""

    def draw(self) -> States:
        """The next batch."""
        ...

    def advance(self, velocities: Mapping[int, Tensor]) -> None:
        """Move on with the velocities (B, C, H, W) that every level, by patch, gave for that batch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later run needs to continue from here."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from such a state."""
        ...


class Draws:
    """Random numbers on a device, from a generator whose state can be kept."""

    def __init__(self, seed: int, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(seed)

    def integers(self, low: int, high: int, count: int) -> Tensor:
        """``count`` integers from ``low`` to ``high``, both included."""
        return torch.randint(low, high + 1, (count,), generator=self.generator, device=self.generator.device)

    def uniform(self, span: tuple[float, float], count: int) -> Tensor:
        """``count`` numbers between two."""
        unit = torch.rand(count, generator=self.generator, device=self.generator.device)
        return span[0] + (span[1] - span[0]) * unit

    def normal(self, *shape: int) -> Tensor:
        """Standard normal noise."""
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def choice(self, count: int, of: int) -> Tensor:
        """``count`` different integers below ``of``."""
        return torch.randperm(of, generator=self.generator, device=self.generator.device)[:count]


def sigma_table(sampler: FlowMatchEulerInfo, most: int, size: tuple[int, int]) -> Tensor:
    """The sampler's noise levels for every number of steps up to ``most``: row n has ``n + 1`` of them, then zeros."""
    table = torch.zeros(most + 1, most + 1)
    for steps in range(1, most + 1):
        tokens = (size[0] // NATIVE_PATCH) * (size[1] // NATIVE_PATCH)
        table[steps, : steps + 1] = torch.from_numpy(sigmas(sampler, steps, tokens))
    return table


class Trajectories:
    """A pool of denoising trajectories, each at its own step; a batch is a random part of it, and moves one step on.

    A finished trajectory gives its place to a new one. The very first ones have a random number of steps, so that soon
    the pool holds all noise levels at any time.
    """

    def __init__(
        self,
        text: Rows,
        sampler: FlowMatchEulerInfo,
        *,
        batch: int,
        latent: tuple[int, int, int],
        steps: tuple[int, int],
        guidance: tuple[float, float] | None,
        draws: Draws,
        on_policy: bool = False,
        pictures: Tensor | None = None,
    ):
        """``latent``: channels, height and width. ``on_policy``: any level may lead a step, not the teacher alone.

        ``pictures``: latents (N, C, H, W) of the N texts. Trajectories then start from them with noise, at any step:
        the pool holds all noise levels at once, and the later a step, the more trajectories pass it.
        """
        self.text, self.batch, self.guidance_span, self.steps_span = text, batch, guidance, steps
        self.draws, self.on_policy, self.pictures, self.size = draws, on_policy, pictures, latent
        self.sigmas = sigma_table(sampler, steps[1], latent[1:]).to(draws.generator.device)
        count = max(POOL_LEAST, POOL_BATCHES * batch)
        self.drawn = torch.arange(0)
        start = self._start(count)
        self.latent, self.prompt, self.guidance = start["latent"], start["prompt"], start["guidance"]
        self.length, self.step = start["length"], start["step"]
        if pictures is None:
            self.length = draws.integers(1, steps[1], count)

    def _start(self, count: int) -> dict[str, Tensor]:
        """New trajectories: latents, prompts, guidance scales, numbers of steps, and those done."""
        latent = self.draws.normal(count, *self.size)
        prompt = self.draws.integers(0, len(self.text) - 1, count)
        guidance = self.draws.uniform(self.guidance_span or (0.0, 0.0), count)
        length = self.draws.integers(*self.steps_span, count)
        step = torch.zeros_like(length)
        if self.pictures is not None:
            step = (self.draws.uniform((0.0, 1.0), count) * length).long()
            sigma = self.sigmas[length, step][:, None, None, None]
            latent = self.pictures[prompt].float().lerp(latent, sigma)
        return {"latent": latent, "prompt": prompt, "guidance": guidance, "length": length, "step": step}

    def draw(self) -> States:
        """A random part of the pool."""
        self.drawn = rows = self.draws.choice(self.batch, len(self.latent))
        sigma = self.sigmas[self.length[rows], self.step[rows]]
        guidance = self.guidance[rows] if self.guidance_span else None
        return States(self.latent[rows], sigma, guidance, **self.text[self.prompt[rows]])

    def advance(self, velocities: Mapping[int, Tensor]) -> None:
        """An Euler step of the states that were drawn last."""
        rows, velocity = self.drawn, velocities[NATIVE_PATCH]
        if self.on_policy:
            levels = self.draws.integers(0, len(velocities) - 1, self.batch)
            velocity = torch.stack(list(velocities.values()))[levels, torch.arange(self.batch, device=levels.device)]
        length, step = self.length[rows], self.step[rows]
        change = self.sigmas[length, step + 1] - self.sigmas[length, step]
        latent = self.latent[rows] + change[:, None, None, None] * velocity
        # where a trajectory is over a new one starts; chosen element by element, because asking would wait for the GPU
        over, start = step + 1 == length, self._start(self.batch)
        self.latent[rows] = torch.where(over[:, None, None, None], start["latent"], latent)
        self.step[rows] = torch.where(over, start["step"], step + 1)
        for name in ("prompt", "guidance", "length"):
            values = getattr(self, name)
            values[rows] = torch.where(over, start[name], values[rows])

    def _state(self) -> dict[str, Tensor]:
        names = ("latent", "prompt", "guidance", "length", "step")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """The pool and the random numbers."""
        return {**self._state(), "draws": self.draws.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a pool."""
        for name, value in self._state().items():
            value.copy_(state[name])
        self.draws.generator.set_state(state["draws"].cpu())


class Noised:
    """Latents of pictures with noise, at the noise levels of the sampler."""

    def __init__(
        self,
        text: Rows,
        latents: Rows,
        sampler: FlowMatchEulerInfo,
        *,
        batch: int,
        latent: tuple[int, int, int],
        steps: tuple[int, int],
        guidance: tuple[float, float] | None,
        draws: Draws,
    ):
        """``text`` and ``latents`` have a row a picture; ``latent``: channels, height and width."""
        self.text, self.latents, self.batch, self.guidance_span = text, latents, batch, guidance
        self.draws, self.steps_span = draws, steps
        self.sigmas = sigma_table(sampler, steps[1], latent[1:]).to(draws.generator.device)

    def draw(self) -> States:
        """Random pictures, noise levels and noise."""
        rows = self.draws.integers(0, len(self.latents) - 1, self.batch)
        length = self.draws.integers(*self.steps_span, self.batch)
        step = (self.draws.uniform((0.0, 1.0), self.batch) * length).long()
        sigma, x = self.sigmas[length, step], self.latents[rows]["latent"]
        guidance = self.draws.uniform(self.guidance_span, self.batch) if self.guidance_span else None
        latent = x.lerp(self.draws.normal(*x.shape), sigma[:, None, None, None])
        return States(latent, sigma, guidance, **self.text[rows])

    def advance(self, velocities: Mapping[int, Tensor]) -> None:
        """Nothing to do: states are drawn anew."""

    def state_dict(self) -> dict[str, Any]:
        """The random numbers."""
        return {"draws": self.draws.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the random numbers."""
        self.draws.generator.set_state(state["draws"].cpu())
