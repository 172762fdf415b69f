"""DPCache (arXiv 2602.22654): the steps to compute were chosen beforehand, by dynamic programming over native runs."""

from dataclasses import dataclass

from ddit.runtime.errors import UsageError
from ddit.runtime.policies.base import RunHistory
from ddit.runtime.policies.prediction import taylor_weights
from ddit.runtime.policies.reuse import Prediction, Reuse

ORDER = 2  # of the Taylor expansion by which the other steps are predicted
FORCED = 3  # steps that are computed at the start


@dataclass(frozen=True)
class DPCache(Reuse):
    """Compute the steps of a path that the bundle knows, and predict the others from the last computed ones.

    The prediction is TaylorSeer's of second order (`taylor_weights`). `ddit.runtime.tools.step_path` finds the path,
    for a number of steps and a size, and says what its cost is.

    The paper predicts features inside the transformer, here the velocity is predicted. A level's velocities are
    predicted from that level's own.
    """

    steps: int  # of the runs that the path is for
    computed: tuple[int, ...]

    name = "dpcache"

    def predict(self, history: RunHistory) -> Prediction | None:
        """The expansion's weights, and whether the step is not on the path."""
        known = history.computed_at_level()
        if not known:
            return None
        return Prediction(taylor_weights(known, history.step, ORDER), history.step not in self.computed)

    def check(self, steps: int) -> None:
        """A path is for one number of steps."""
        if steps != self.steps:
            raise UsageError(f"dpcache's path is for {self.steps} steps, not {steps}; give --steps {steps} too")

    def __str__(self) -> str:
        return self.name
