"""TaylorSeer (arXiv 2503.06923): every N-th step is computed, those between are predicted from finite differences."""

from dataclasses import dataclass

from ddit.runtime.policies.base import RunHistory
from ddit.runtime.policies.prediction import taylor_weights
from ddit.runtime.policies.reuse import Prediction, Reuse


@dataclass(frozen=True)
class TaylorSeer(Reuse):
    """Compute every ``interval``-th step; predict the k-th step after a computed one by a Taylor expansion in k.

        v̂(k) = Σᵢ Δⁱv / (i! Nⁱ) · kⁱ        i = 0 … ``order``, N = ``interval``

    The paper counts time downwards and writes (−k)ⁱ. Order 0 is plain reuse. The first ``first`` steps are computed,
    as in the authors' code; where computed steps lie nearer to each other than ``interval``, as there, differences are
    divided by the distance that they have.

    The paper predicts the output of every attention and feed-forward layer of the transformer. Here the velocity is
    predicted, which needs no layer to run and three tensors to be kept. A level's velocities are predicted from that
    level's own: after a change of level the order grows from 0.
    """

    interval: int = 4  # steps from one computed step to the next
    order: int = 2  # of the expansion
    first: int = 3  # steps computed at the start

    name = "taylorseer"

    def predict(self, history: RunHistory) -> Prediction | None:
        """The expansion's weights, and whether it is a step between computed ones."""
        computed = history.computed_at_level()
        if not computed:
            return None
        weights = taylor_weights(computed, history.step, self.order)
        enough = history.step - computed[0] < self.interval and len(history.computed) >= self.first
        return Prediction(weights, enough)

    def __str__(self) -> str:
        return f"taylorseer:interval={self.interval},order={self.order},first={self.first}"
