"""Progressive resolution: first a smaller latent, which grows when its finer frequencies begin to matter.

Spectral Progressive Diffusion (arXiv 2605.18736) needs no training: a small latent has few tokens, and as long as noise
hides a picture's fine detail there is nothing to compute it for. docs/method.md has the equations.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from math import hypot, sqrt

import numpy as np

from ddit.runtime.bundle.manifest import SpectrumInfo
from ddit.runtime.policies.base import Decision, FloatArray, Policy, RunHistory
from ddit.runtime.samplers.growing import dct_matrix

EDGE = 0.9  # the band's edge: frequencies from this share of the highest one on


@dataclass(frozen=True)
class Stage:
    """A size of the latent."""

    scale: Fraction  # of the full height and width
    frequency: float  # ω: it holds all frequencies below, in periods along the shorter side
    pixels: int  # of the latent


@dataclass(frozen=True)
class Progressive(Policy):
    """Another policy's steps, the first of them on a smaller latent.

    The latent leaves a stage at the first step whose noise level is at most t*(ω), the level at which the frequency ω
    just above the stage's band is activated (`activation`), and at the last step at the latest. The power P(ω) is that
    of the model's latents, A·ω^−β. With ``own`` it is the picture's: that of the last step's estimate of the clean
    latent at the edge of the stage's band.

    Where the latent grows, a run starts anew for the other policy: what it knows of steps is about another size.
    """

    policy: Policy
    stages: tuple[Stage, ...]  # the smallest first, the full size last
    delta: float  # the tolerance δ
    spectrum: SpectrumInfo
    own: bool = False

    def decide(self, history: RunHistory) -> Decision:
        """What the other policy says, at the size that is due."""
        before = next(stage for stage in self.stages if stage.scale == history.scale)
        number = first = self.stages.index(before)
        sigma = float(history.sigmas[history.step])
        figures: dict[str, float] = {}
        while number < len(self.stages) - 1:
            power = self.power(self.stages[number], history if number == first else None)
            until = activation(power, self.delta)
            figures = {"edge_power": power, "grows_at": until}
            if sigma > until and history.step < history.steps - 1:
                break
            number += 1
        stage = self.stages[number]
        factor = gain(sqrt(stage.pixels / before.pixels), sigma)
        decision = self.policy.decide(history if stage is before else history.grown(stage.scale, factor))
        return replace(decision, scale=stage.scale, gain=factor, figures={**decision.figures, **figures})

    def power(self, stage: Stage, history: RunHistory | None) -> float:
        """P at a stage's edge, as a coefficient of the full latent's orthonormal DCT has it."""
        estimate = history.estimate() if self.own and history else None
        if estimate is None:
            return self.spectrum.amplitude / math.pow(stage.frequency, self.spectrum.exponent)
        return self.stages[-1].pixels / stage.pixels * edge_power(estimate)

    def scales(self) -> tuple[Fraction, ...]:
        """Those of the stages."""
        return tuple(stage.scale for stage in self.stages)

    def steps(self, asked: int | None, default: int) -> int:
        """As many as the other policy has."""
        return self.policy.steps(asked, default)

    @property
    def gate(self) -> bool:
        """Whether the other policy needs it."""
        return self.policy.gate

    def quantile(self) -> float | None:
        """That of the other policy."""
        return self.policy.quantile()

    def knob(self) -> str | None:
        """That of the other policy."""
        return self.policy.knob()

    def turned(self, value: float) -> "Progressive":
        """With another value of it."""
        return replace(self, policy=self.policy.turned(value))

    def describe(self) -> dict[str, object]:
        """The other policy, and when the latent grows."""
        own = {
            "delta": self.delta,
            "scales": [float(scale) for scale in self.scales()],
            "adaptive": self.own,
            "spectrum": self.spectrum.model_dump(),
        }
        return {**self.policy.describe(), "text": str(self), "progressive": own}

    def __str__(self) -> str:
        scales = "-".join(str(scale) for scale in self.scales()[:-1])
        return f"{self.policy}+progressive:{'adaptive,' * self.own}delta={self.delta:g},scales={scales}"


def activation(power: float, delta: float) -> float:
    """t*: the noise level at which a frequency of this power is activated (equation 9)."""
    odds = power * (1 + power - delta)
    return 1 / (1 + sqrt(delta / odds)) if odds > 0 else 0.0


def gain(ratio: float, sigma: float) -> float:
    """κ: what a latent whose sides grow by ``ratio`` at a noise level is multiplied with, and the level with it.

    >>> gain(2.0, 1.0), gain(1.0, 0.5)
    (1.0, 1.0)
    """
    return ratio / (1 + (ratio - 1) * sigma)


def edge_power(latent: FloatArray) -> float:
    """The mean power of a latent (C, …, H, W) in orthonormal DCT-II coefficients at the edge of its band."""
    height, width = latent.shape[-2:]
    spectrum = dct_matrix(height) @ latent @ dct_matrix(width).T
    edge = [(i, j) for i in range(height) for j in range(width) if EDGE <= hypot(i / height, j / width) < 1]
    rows, columns = np.array(edge).T
    return float(np.mean(np.square(spectrum[..., rows, columns])))
