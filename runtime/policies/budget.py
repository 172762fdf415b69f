"""Time budgets: the schedule that makes the best picture in a given time, and keeps to it.

The plan comes from measured milliseconds per level. Where native steps fit, all are native. Otherwise the dynamic
schedule runs with the smallest calibrated τ that is fast enough; without a calibration, as many native steps as fit
come first, and the coarsest ones after them: what a picture shows is decided early (docs/fidelity.md). Whatever the
plan, a step that would leave too little time for the rest runs coarser.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from ddit.runtime.bundle.manifest import Costs, CurvePoint
from ddit.runtime.errors import UsageError
from ddit.runtime.policies.base import Decision, Policy, RunHistory
from ddit.runtime.policies.dynamic import Dynamic
from ddit.runtime.policies.fixed import Fixed
from ddit.runtime.policies.native import Native

MARGIN = 1.05  # a calibrated speed-up is a mean over prompts: ask for a little more


@dataclass(frozen=True)
class Budgeted(Policy):
    """A policy with a deadline: what another one wants, or coarser where the remaining steps would not fit."""

    wanted: Policy
    milliseconds: Mapping[int, float]  # of a step at every level
    total: int  # steps of the run
    deadline: float  # seconds on the clock, when the last step has to be done
    clock: Callable[[], float] = perf_counter

    def decide(self, history: RunHistory) -> Decision:
        """The wanted level, or the next coarser one after which the coarsest would still be in time."""
        left = (self.deadline - self.clock()) * 1000
        fastest = min(self.milliseconds, key=self.milliseconds.__getitem__)
        reserve = (self.total - history.step - 1) * self.milliseconds[fastest]
        wanted = self.wanted.decide(history)
        if wanted.level is None:
            return wanted
        in_time = (p for p in sorted(self.milliseconds) if p >= wanted.level and self.milliseconds[p] + reserve <= left)
        return replace(wanted, level=next(in_time, fastest))

    @property
    def gate(self) -> bool:
        """Whether the wanted policy needs it."""
        return self.wanted.gate

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


def plan(seconds: float, costs: Costs, steps: int, *, default: Dynamic, curve: Sequence[CurvePoint] = ()) -> Policy:
    """The schedule for a picture of ``steps`` steps in ``seconds``, text encoders and decoder included.

    ``default`` has the dynamic schedule's levels, ρ and warm-up, ``curve`` what its τ does to the levels' shares.
    Raises `UsageError` where not even the coarsest steps fit, with the time that they need and the number that fits.
    """
    around = costs.encode + costs.decode
    allowed = seconds * 1000 - around
    native, fastest = costs.levels[default.native], min(costs.levels.values())
    if steps * fastest > allowed:
        raise UsageError(
            f"{steps} steps need at least {(steps * fastest + around) / 1000:.2f} s here, {around / 1000:.2f} s of it "
            f"for text and decoding; {seconds:g} s are enough for {max(0, int(allowed / fastest))} steps"
        )
    if steps * native <= allowed:
        return Native(default.native)
    for point in curve:
        if MARGIN * steps * sum(share * costs.levels[patch] for patch, share in point.shares.items()) <= allowed:
            return replace(default, tau=point.tau)
    return Fixed(native_first(allowed, costs.levels, steps, default.native))


def native_first(allowed: float, milliseconds: Mapping[int, float], steps: int, native: int) -> tuple[int, ...]:
    """As many native steps as fit into ``allowed`` milliseconds, then steps of the fastest level."""
    fastest = min(milliseconds, key=milliseconds.__getitem__)
    spare, price = allowed - steps * milliseconds[fastest], milliseconds[native] - milliseconds[fastest]
    count = max(0, min(steps, int(spare / price))) if price > 0 else 0
    return (native,) * count + (fastest,) * (steps - count)
