"""SpectralCache (arXiv 2603.05315): TeaCache with a threshold that follows the run, and a test of each band."""

from dataclasses import dataclass
from math import cos, pi

from ddit.runtime.policies.base import RunHistory
from ddit.runtime.policies.reuse import Prediction, Reuse
from ddit.runtime.policies.teacache import accumulated_change


@dataclass(frozen=True)
class SpectralCache(Reuse):
    """Repeat the last computed velocity while TeaCache's sum and the change of both bands are below their thresholds.

        τ(t) = ``threshold`` · s(t),  s(t) = ``least`` + (``most`` − ``least``) · (1 − cos 2πt/T) / 2
        reuse at step t while  Σ f(d) < τ(t),  d_low ≤ ``low`` · τ(t),  d_high ≤ ``high`` · τ(t)

    and at most ``longest`` steps in a row; t counts steps from 0, T is the number of all. The first and the last step
    are computed. Σ f(d) is the sum of `TeaCache`; d_low and d_high are the relative L1 changes from the step before, of
    the first and the second half of the modulated input's channels. That is what the authors' code calls bands: no
    frequencies of the picture. It gives the defaults too.

    The paper repeats the residual of the transformer's blocks, here the velocity is repeated; none at threshold 0.
    """

    coefficients: tuple[float, ...]  # of TeaCache's polynomial, the highest power first
    threshold: float = 0.6
    low: float = 0.8  # of the threshold, for the first band
    high: float = 1.5  # for the second
    least: float = 0.5  # of the threshold, at the first and the last step
    most: float = 1.5  # in the middle of the run
    longest: int = 2  # steps reused in a row

    name = "spectralcache"
    knob = "threshold"
    gate = True

    def predict(self, history: RunHistory) -> Prediction | None:
        """The last velocity, and whether all tests allow it."""
        if not history.computed:
            return None
        change, accumulated = history.changes[-1], accumulated_change(history, self.coefficients)
        scale = self.least + (self.most - self.least) * (1 - cos(2 * pi * history.step / history.steps)) / 2
        threshold = self.threshold * scale
        in_a_row = history.step - 1 - history.computed[-1]
        enough = (
            threshold > 0
            and accumulated < threshold
            and change.low <= self.low * threshold
            and change.high <= self.high * threshold
            and in_a_row < self.longest
            and history.step < history.steps - 1
        )
        figures = {"low": change.low, "high": change.high, "accumulated": accumulated, "threshold": threshold}
        return Prediction((1.0,), enough, figures=figures)

    def __str__(self) -> str:
        return (
            f"spectralcache:threshold={self.threshold:g},low={self.low:g},high={self.high:g},"
            f"least={self.least:g},most={self.most:g},longest={self.longest}"
        )
