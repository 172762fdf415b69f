"""Reuse: steps that run no level, because what earlier steps found is good enough.

A `Reuse` says when; `Reusing` puts it before a policy that picks the levels of the other steps. What is reused is the
velocity on the full-resolution latent, as it was or carried on by a polynomial. Papers that reuse features inside the
transformer differ in that, and each method's docstring says how.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from ddit.runtime.policies.base import Decision, Policy, RunHistory


@dataclass(frozen=True)
class Prediction:
    """What a method of reuse makes of the kept velocities for the next step."""

    weights: tuple[float, ...]  # of the kept velocities, the newest first
    enough: bool  # whether the step needs no level
    correction: float = 0.0  # Δσ, if the step runs a level all the same (`Decision.correction`)
    figures: Mapping[str, float] = field(default_factory=dict)  # on what was decided, by name


class Reuse(ABC):
    """Decides which steps run no level. Immutable.

    To add one, write a subclass in a module of its own and its written form in `ddit.runtime.policies.parse`.
    """

    name: str  # in the written form and the trace
    knob: str | None = None  # the name of the number that trades quality for speed, larger is faster

    @abstractmethod
    def predict(self, history: RunHistory) -> Prediction | None:
        """What there is for the next step; None where nothing can be predicted yet."""

    @abstractmethod
    def __str__(self) -> str:
        """The written form."""


@dataclass(frozen=True)
class Reusing(Policy):
    """A policy whose steps run no level where a method of reuse has enough."""

    levels: Policy  # decides the steps that are computed
    reuse: Reuse

    def decide(self, history: RunHistory) -> Decision:
        """A prediction, or what the levels' policy says."""
        found = self.reuse.predict(history)
        if found is not None and found.enough:
            return Decision(None, found.weights, by=self.reuse.name, figures=found.figures)
        decision = self.levels.decide(history)
        if found is None:
            return decision
        figures = {**decision.figures, **found.figures}
        return replace(decision, prediction=found.weights, correction=found.correction, figures=figures)

    def steps(self, asked: int | None, default: int) -> int:
        """As many as the levels' policy has."""
        return self.levels.steps(asked, default)

    def quantile(self) -> float | None:
        """That of the levels' policy."""
        return self.levels.quantile()

    def knob(self) -> str | None:
        """That of the method of reuse."""
        return self.reuse.knob

    def turned(self, value: float) -> "Reusing":
        """With another value of it."""
        assert self.reuse.knob is not None
        return replace(self, reuse=replace(self.reuse, **{self.reuse.knob: value}))  # type: ignore[type-var]

    def describe(self) -> dict[str, object]:
        """Both, the levels' policy first."""
        return {**self.levels.describe(), "text": str(self), "reuse": {"kind": self.reuse.name, **asdict(self.reuse)}}  # type: ignore[call-overload]

    def __str__(self) -> str:
        return f"{self.levels}+{self.reuse}"
