"""Where the noisy latents come from that coarse levels are trained on.

`Trajectories` are the states that a sampler goes through. The teacher's velocity at a state is the target there, and it
also leads to the next state, so a trajectory costs no extra call of the model. `Noised` are latents of pictures with
noise: z = (1 − σ) x + σ noise. Trajectories may start from such, too.

Trajectories take Euler steps between the sampler's noise levels, whatever solver the sampler is: UniPC needs the
velocities of several steps, and its corrector goes back. The states of both lie on the same flow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ddit.exporter.steps.patches import per_sample
from ddit.runtime.bundle.manifest import SamplerInfo
from ddit.runtime.samplers.sigmas import sigmas, timesteps
from training.distillation import States
from training.encoding import Rows

POOL_BATCHES, POOL_LEAST = 8, 64  # size of the pool: 8 batches, but at least 64 trajectories


class StateSource(Protocol):
    """Gives states to train on, again and again."""

    def draw(self) -> States:
        """The next batch."""
        ...

    def advance(self, velocities: Mapping[int, Tensor]) -> None:
        """Move on with the velocities (B, C, …, H, W) that every level, by patch, gave for that batch."""
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


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is sampled, and how."""

    sampler: SamplerInfo
    tokens: int  # of a latent at the native level
    latent: tuple[int, ...]  # channels, then the axes: frames for clips, height and width
    steps: tuple[int, int]  # the fewest and the most of a trajectory
    guidance: tuple[float, float] | None  # the least and the largest scale; None for a model that takes none

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The noise levels, and those that the model is told, for every number of steps up to the most.

        Row n of the first has ``n + 1`` of them, row n of the second ``n``, then there are zeros.
        """
        most = self.steps[1]
        levels, told = torch.zeros(2, most + 1, most + 1)
        for steps in range(1, most + 1):
            levels[steps, : steps + 1] = torch.from_numpy(sigmas(self.sampler, steps, self.tokens))
            told[steps, :steps] = torch.from_numpy(timesteps(self.sampler, steps, self.tokens))
        return levels.to(device), told.to(device)


@dataclass(frozen=True)
class Text:
    """The prompts, encoded."""

    prompts: Rows  # a row a prompt, of the levels' inputs that text feeds
    negative: Rows | None = None  # one row, for a model that is guided by two passes

    def __len__(self) -> int:
        """How many prompts."""
        return len(self.prompts)

    def of(self, prompts: Tensor) -> dict[str, Any]:
        """What `States` have of the prompts of these numbers (B,)."""
        negative = None if self.negative is None else self.negative[torch.zeros_like(prompts)]
        return {"text": self.prompts[prompts], "negative": negative}


class Trajectories:
    """A pool of denoising trajectories, each at its own step; a batch is a random part of it, and moves one step on.

    A finished trajectory gives its place to a new one. The very first ones have a random number of steps, so that soon
    the pool holds all noise levels at any time.
    """

    def __init__(
        self,
        text: Text,
        sampling: Sampling,
        *,
        batch: int,
        draws: Draws,
        on_policy: bool = False,
        pictures: Tensor | None = None,
    ):
        """``on_policy``: any level may lead a step, not the teacher alone.

        ``pictures``: latents (N, C, …, H, W) of the N texts. Trajectories then start from them with noise, at any step:
        the pool holds all noise levels at once, and the later a step, the more trajectories pass it.
        """
        self.text, self.sampling, self.batch = text, sampling, batch
        self.draws, self.on_policy, self.pictures = draws, on_policy, pictures
        self.sigmas, self.timesteps = sampling.tables(draws.generator.device)
        count = max(POOL_LEAST, POOL_BATCHES * batch)
        self.drawn = torch.arange(0)
        start = self._start(count)
        self.latent, self.prompt, self.guidance = start["latent"], start["prompt"], start["guidance"]
        self.length, self.step = start["length"], start["step"]
        if pictures is None:
            self.length = draws.integers(1, sampling.steps[1], count)

    def _start(self, count: int) -> dict[str, Tensor]:
        """New trajectories: latents, prompts, guidance scales, numbers of steps, and those done."""
        latent = self.draws.normal(count, *self.sampling.latent)
        prompt = self.draws.integers(0, len(self.text) - 1, count)
        guidance = self.draws.uniform(self.sampling.guidance or (0.0, 0.0), count)
        length = self.draws.integers(*self.sampling.steps, count)
        step = torch.zeros_like(length)
        if self.pictures is not None:
            step = (self.draws.uniform((0.0, 1.0), count) * length).long()
            sigma = per_sample(self.sigmas[length, step], latent)
            latent = self.pictures[prompt].float().lerp(latent, sigma)
        return {"latent": latent, "prompt": prompt, "guidance": guidance, "length": length, "step": step}

    def draw(self) -> States:
        """A random part of the pool."""
        self.drawn = rows = self.draws.choice(self.batch, len(self.latent))
        timestep = self.timesteps[self.length[rows], self.step[rows]]
        guidance = self.guidance[rows] if self.sampling.guidance else None
        return States(self.latent[rows], timestep, guidance=guidance, **self.text.of(self.prompt[rows]))

    def advance(self, velocities: Mapping[int, Tensor]) -> None:
        """An Euler step of the states that were drawn last; the first of the velocities is the teacher's."""
        rows, velocity = self.drawn, next(iter(velocities.values()))
        if self.on_policy:
            levels = self.draws.integers(0, len(velocities) - 1, self.batch)
            velocity = torch.stack(list(velocities.values()))[levels, torch.arange(self.batch, device=levels.device)]
        length, step = self.length[rows], self.step[rows]
        change = self.sigmas[length, step + 1] - self.sigmas[length, step]
        latent = self.latent[rows] + per_sample(change, velocity) * velocity
        # where a trajectory is over a new one starts; chosen element by element, because asking would wait for the GPU
        over, start = step + 1 == length, self._start(self.batch)
        self.latent[rows] = torch.where(per_sample(over, latent), start["latent"], latent)
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
        text: Text,
        latents: Rows,
        sampling: Sampling,
        *,
        batch: int,
        draws: Draws,
    ):
        """``text`` and ``latents`` have a row a picture."""
        self.text, self.latents, self.sampling, self.batch, self.draws = text, latents, sampling, batch, draws
        self.sigmas, self.timesteps = sampling.tables(draws.generator.device)

    def draw(self) -> States:
        """Random pictures, noise levels and noise."""
        rows = self.draws.integers(0, len(self.latents) - 1, self.batch)
        length = self.draws.integers(*self.sampling.steps, self.batch)
        step = (self.draws.uniform((0.0, 1.0), self.batch) * length).long()
        sigma, x = self.sigmas[length, step], self.latents[rows]["latent"]
        span = self.sampling.guidance
        guidance = self.draws.uniform(span, self.batch) if span else None
        latent = x.lerp(self.draws.normal(*x.shape), per_sample(sigma, x))
        return States(latent, self.timesteps[length, step], guidance=guidance, **self.text.of(rows))

    def advance(self, velocities: Mapping[int, Tensor]) -> None:
        """Nothing to do: states are drawn anew."""

    def state_dict(self) -> dict[str, Any]:
        """The random numbers."""
        return {"draws": self.draws.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the random numbers."""
        self.draws.generator.set_state(state["draws"].cpu())
