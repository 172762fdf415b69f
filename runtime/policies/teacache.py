"""TeaCache (arXiv 2411.19108): a step repeats the last computed velocity while the model's input has changed little."""

from collections.abc import Sequence
from dataclasses import dataclass

from ddit.runtime.policies.base import RunHistory
from ddit.runtime.policies.reuse import Prediction, Reuse


@dataclass(frozen=True)
class TeaCache(Reuse):
    """Repeat the last computed velocity while the accumulated estimate of its change is below a threshold.

        reuse at step t while  Σ f(d_s) < ``threshold``,  over the steps s after the last computed one up to t,
        d_s = mean|x_s − x_{s−1}| / mean|x_{s−1}|

    x is the first block's timestep-modulated input, which the bundle's gate graph computes before the step. f is a
    polynomial that was fitted to the relative L1 change of the model's output; the bundle knows it. The first and the
    last step are computed. The published polynomial for FLUX.1 belongs with the thresholds 0.25, 0.4, 0.6 and 0.8.

    The paper repeats the residual of all transformer blocks, and runs the layers after them with the step's own
    timestep. Here the velocity is repeated as it was. At threshold 0 nothing is reused, not even where the polynomial
    is below 0. The gate looks at the native level's input, whichever level found the velocity.
    """

    coefficients: tuple[float, ...]  # of the polynomial, the highest power first
    threshold: float = 0.4

    name = "teacache"
    knob = "threshold"
    gate = True

    def predict(self, history: RunHistory) -> Prediction | None:
        """The last velocity, and whether little has changed since."""
        if not history.computed:
            return None
        accumulated = accumulated_change(history, self.coefficients)
        enough = accumulated < self.threshold and self.threshold > 0 and history.step < history.steps - 1
        return Prediction((1.0,), enough, figures={"change": history.changes[-1].whole, "accumulated": accumulated})

    def __str__(self) -> str:
        return f"teacache:threshold={self.threshold:g}"


def accumulated_change(history: RunHistory, coefficients: Sequence[float]) -> float:
    """The estimated relative changes of the model's output since the last computed step, added up."""
    return sum(polynomial(coefficients, change.whole) for change in history.changes_since_computed())


def polynomial(coefficients: Sequence[float], value: float) -> float:
    """A polynomial's value (Horner); the highest power's coefficient comes first, as in NumPy's ``polyval``.

    >>> polynomial([2.0, 0.0, 1.0], 3.0)
    19.0
    """
    result = 0.0
    for coefficient in coefficients:
        result = result * value + coefficient
    return result
