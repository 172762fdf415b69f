"""Time budgets: the schedule that makes the best picture in a given time, and keeps to it.

The plan comes from measured milliseconds. Where native steps fit, all are native. Otherwise the adaptive policy runs
with the smallest tolerance that is fast enough, by the bundle's calibration or, without one, by what is typical.
Whatever the plan, a step that would leave too little time for the rest is predicted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from ddit.runtime.bundle.manifest import Costs, CurvePoint
from ddit.runtime.errors import UsageError
from ddit.runtime.policies.adaptive import Adaptive
from ddit.runtime.policies.base import Decision, Policy, RunHistory
from ddit.runtime.policies.native import Native
from ddit.runtime.policies.reuse import Reusing

MARGIN = 1.05  # a number of computed steps is a mean over prompts: ask for a little less

# tolerances with the number of steps that they compute, in the mean of the demo model's pictures of 50 steps
# (docs/fidelity.md); other numbers of steps are near it, because it is the path's length that counts
TYPICAL = ((0.04, 14.9), (0.1, 12.6), (0.2, 11.5))


@dataclass(frozen=True)
class Budgeted(Policy):
    """A policy with a deadline: what another one wants, or a prediction where the remaining steps would not fit."""

    wanted: Policy
    costs: Costs
    total: int  # steps of the run
    deadline: float  # seconds on the clock, when the last step has to be done
    clock: Callable[[], float] = perf_counter

    def decide(self, history: RunHistory) -> Decision:
        """The wanted step, if after it there is time to predict the others."""
        wanted = self.wanted.decide(history)
        if wanted.level is None or not wanted.prediction:  # at first there is nothing to predict from
            return wanted
        left = (self.deadline - self.clock()) * 1000
        reserve = (self.total - history.step - 1) * self.costs.predicted
        if self.costs.levels[wanted.level] + reserve <= left:
            return wanted
        return Decision(None, wanted.prediction, by="budget", figures={"milliseconds_left": left})

    @property
    def gate(self) -> bool:
        """Whether the wanted policy needs it."""
        return self.wanted.gate

    @property
    def timed(self) -> bool:
        """Always."""
        return True

    def quantile(self) -> float | None:
        """That of the wanted policy."""
        return self.wanted.quantile()

    def steps(self, asked: int | None, default: int) -> int:
        """As many as were planned."""
        return self.total

    def describe(self) -> dict[str, object]:
        """The wanted policy."""
        return self.wanted.describe()

    def __str__(self) -> str:
        return str(self.wanted)


def plan(
    seconds: float, costs: Costs, steps: int, *, native: int, default: Adaptive, curve: Sequence[CurvePoint] = ()
) -> Policy:
    """The schedule for a picture of ``steps`` steps in ``seconds``, text encoders and decoder included.

    ``native`` is the native patch, ``curve`` what the tolerance does to the native steps' share. Raises `UsageError`
    where not even the fewest computed steps fit, with the time that they need.
    """
    around = costs.encode + costs.decode
    allowed = seconds * 1000 - around

    def needed(computed: float) -> float:
        return computed * costs.levels[native] + (steps - computed) * costs.predicted

    fewest = min(steps, default.order + 2)
    if needed(fewest) > allowed:
        raise UsageError(
            f"{steps} steps need at least {(needed(fewest) + around) / 1000:.2f} s here, {around / 1000:.2f} s of it "
            f"for text and decoding and the rest for {fewest} computed steps; {seconds:g} s are too short"
        )
    if needed(steps) <= allowed:
        return Native(native)
    tried = [(point.value, point.shares.get(native, 0.0) * steps) for point in curve] or TYPICAL
    fitting = (value for value, count in sorted(tried) if MARGIN * needed(min(count, steps)) <= allowed)
    tolerance = next(fitting, max(value for value, _ in tried))
    return Reusing(Native(native), replace(default, tolerance=tolerance))
