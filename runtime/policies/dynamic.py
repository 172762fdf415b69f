"""DDiT's policy (arXiv 2602.16968): as coarse as the latent's third difference is smooth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ddit.runtime.policies.base import DIFFERENCE_ORDER, Decision, FloatArray, Policy, RunHistory


@dataclass(frozen=True)
class Dynamic(Policy):
    """The next step runs at the largest patch whose statistic lies under its threshold, else at the native patch.

    The statistic σ_p of a patch size p is the ``rho`` quantile of the deviations inside the p×p patches of the latent.
    The first ``warmup`` steps are native. ``tau`` belongs to a model, a step count and a sigma shift, so it is
    calibrated. The threshold is ``tau`` times the statistic of smooth pictures after the same step, which ``smooth``
    holds by patch (`ddit.runtime.policies.smooth`); without ``smooth`` it is ``tau`` itself, as in the paper.

    A level runs for ``hold`` steps before it is judged. Levels disagree a little about the velocity, so that the third
    difference shows a switch of level for three steps, and right after a coarse step it would forbid the next one
    (docs/method.md). The paper has no such rule: ``hold`` = 1 is its method.
    """

    native: int
    coarse: tuple[int, ...]
    tau: float
    rho: float
    warmup: int
    hold: int = DIFFERENCE_ORDER
    smooth: Mapping[int, Sequence[float]] | None = None

    def decide(self, history: RunHistory) -> Decision:
        """The largest patch under the threshold."""
        levels = history.levels
        if not self.judges(levels, history.first):
            warm = levels and history.step >= self.warmup
            return Decision(levels[-1] if warm else self.native, by="dynamic")
        under = [
            patch
            for patch in self.coarse
            if statistic(history.deviations[patch], self.rho) < self.threshold(patch, history.step - 1)
        ]
        return Decision(max(under, default=self.native), by="dynamic")

    def judges(self, levels: Sequence[int], first: int = 0) -> bool:
        """Whether the next level depends on the deviations: the warm-up is over, and a level has run long enough.

        ``levels`` are those of the steps from ``first`` on, where the differences start anew.
        """
        warm = first + len(levels) >= self.warmup and len(levels) >= DIFFERENCE_ORDER
        return warm and all(patch == levels[-1] for patch in levels[-self.hold :])

    def threshold(self, patch: int, step: int) -> float:
        """What the statistic after a step must lie under."""
        return self.tau * (self.smooth[patch][step] if self.smooth else 1.0)

    def knob(self) -> str:
        """τ."""
        return "tau"

    def quantile(self) -> float:
        """ρ."""
        return self.rho

    def __str__(self) -> str:
        coarsest = max(self.coarse, default=self.native)
        rule = f"rho={self.rho:g},warmup={self.warmup},hold={self.hold},coarsest={coarsest}"
        return f"dynamic:tau={self.tau:.4g},{rule}{'' if self.smooth else ',absolute=1'}"


def statistic(deviation: FloatArray, rho: float) -> float:
    """σ_p: the ``rho`` quantile of the patches' deviations.

    A quantile and not the mean, so that a flat background does not hide a zebra.
    """
    return float(statistics(deviation[np.newaxis], rho)[0])


def statistics(deviations: FloatArray, rho: float) -> FloatArray:
    """The same of several latents (B, …), one number each: NumPy takes no longer for many than for one."""
    found: FloatArray = np.quantile(deviations.reshape(len(deviations), -1), rho, axis=1)
    return found
