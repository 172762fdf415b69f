"""What a policy is: it decides what every denoising step does, and knows nothing of the model or of where it runs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

DIFFERENCE_ORDER = 3  # a third difference needs three finished steps


@dataclass(frozen=True)
class Decision:
    """What one denoising step of one sample does: run a level, or predict the velocity.

    A computed step may have a prediction too. It shows what a prediction in its place would have missed (v − v̂), and
    ``correction`` times that moves the latent: what the predicted steps before it should have done.
    """

    level: int | None  # the patch size that it runs at; None: no level runs, the velocity is predicted
    prediction: tuple[float, ...] = ()  # weights of the kept velocities in v̂, the newest first; empty: none
    correction: float = 0.0  # Δσ
    by: str = ""  # the policy that decided
    figures: Mapping[str, float] = field(default_factory=dict)  # on what, by name
    scale: Fraction = Fraction(1)  # share of the full latent's height and width; one that it has not grows first,
    gain: float = 1.0  # and this is κ: the step then starts at the noise level κσ


@dataclass(frozen=True)
class Change:
    """What a bundle's gate finds before a step: the relative L1 change of the first block's modulated input x.

    mean|x − x'| / mean|x'|, where x' is that of the step before.
    """

    whole: float
    low: float  # of the first half of the channels
    high: float  # of the second half


@dataclass
class RunHistory:
    """A run so far, as its policy sees it."""

    sigmas: FloatArray  # noise levels of all steps and 0 at the end
    # number of the first step that this tells of: above 0 where the latent was given in the middle of a run, or grew
    first: int = 0
    # of the steps that are done; a predicted one has the level of the computed one before it
    levels: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)  # numbers of the steps that ran a level
    # the root mean square of v − v̂ in every native patch, (H/p, W/p), at the last computed step;
    # None where nothing was predicted for it
    error: FloatArray | None = None
    # by the gate, of every step up to the one to decide on; empty where the policy needs none (`Policy.gate`)
    changes: list[Change] = field(default_factory=list)
    # for every coarse patch p the standard deviation of the latent's third difference inside each p×p patch after the
    # last step, (H/p, W/p); empty until three steps are done
    deviations: Mapping[int, FloatArray] = field(default_factory=dict)
    scale: Fraction = Fraction(1)  # of the latent: its share of the full height and width
    # reads the estimate of the clean latent that the last step made, (C, H, W); None where no level has run yet
    estimate: Callable[[], FloatArray | None] = lambda: None

    @property
    def step(self) -> int:
        """The number of the step to decide on, from 0."""
        return self.first + len(self.levels)

    @property
    def steps(self) -> int:
        """The number of all steps."""
        return len(self.sigmas) - 1

    def changes_since_computed(self) -> list[Change]:
        """Those of the steps after the last computed one, the step to decide on included."""
        return self.changes[self.computed[-1] + 1 - self.first :]

    def computed_at_level(self) -> list[int]:
        """The steps that were computed since the level last changed, the newest first."""
        last = reversed(self.computed)
        return list(takewhile(lambda step: self.levels[step - self.first] == self.levels[-1], last))

    def grown(self, scale: Fraction, gain: float) -> "RunHistory":
        """The history after the latent has grown, before the step: it starts anew, at a higher noise level."""
        sigmas = self.sigmas.copy()
        sigmas[self.step] *= gain
        return RunHistory(sigmas, self.step, scale=scale, estimate=self.estimate)

    def record(self, decision: Decision, error: FloatArray, deviations: Mapping[int, FloatArray]) -> None:
        """Take a finished step, with what it measured."""
        if decision.level is None:
            self.levels.append(self.levels[-1])
        else:
            self.computed.append(self.step)
            self.levels.append(decision.level)
            self.error = error if decision.prediction else None
        if len(self.levels) >= DIFFERENCE_ORDER:
            self.deviations = deviations


class Policy(ABC):
    """Decides the steps of runs. Immutable, so that one object serves every sample and thread.

    To add one, write a subclass in a module of its own and its written form in `ddit.runtime.policies.parse`.
    """

    @abstractmethod
    def decide(self, history: RunHistory) -> Decision:
        """What the next step does."""

    @abstractmethod
    def __str__(self) -> str:
        """The written form, which `ddit.runtime.policies.parse.parse_schedule` reads."""

    def steps(self, asked: int | None, default: int) -> int:
        """How many steps a run has. Raises `UsageError` where ``asked`` does not fit the policy."""
        return default if asked is None else asked

    @property
    def gate(self) -> bool:
        """Whether it needs what the bundle's gate finds before every step (`RunHistory.changes`)."""
        return False

    @property
    def timed(self) -> bool:
        """Whether it looks at the clock, so that a decision is only good at the moment."""
        return False

    def quantile(self) -> float | None:
        """The quantile ρ of the deviations that it looks at; None for a policy that looks at none."""
        return None

    def scales(self) -> tuple[Fraction, ...]:
        """The scales that it decides among, the one to start at first and 1 at the end."""
        return (Fraction(1),)

    def knob(self) -> str | None:
        """The name of the number that trades quality for speed, larger is faster; None where there is none."""
        return None

    def turned(self, value: float) -> "Policy":
        """The policy with another value of that number."""
        name = self.knob()
        assert name is not None
        changed: Policy = replace(self, **{name: value})  # type: ignore[type-var]
        return changed

    def describe(self) -> dict[str, object]:
        """The policy as plain data, for the trace."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}  # type: ignore[arg-type]
        return {"kind": type(self).__name__.lower(), "text": str(self), **values}
