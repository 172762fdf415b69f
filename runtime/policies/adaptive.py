"""Prediction with error control: one tolerance decides which steps are computed (docs/method.md)."""

from dataclasses import dataclass

from ddit.runtime.policies.base import RunHistory
from ddit.runtime.policies.prediction import lagrange_weights, newton_product, root_mean_square
from ddit.runtime.policies.reuse import Prediction, Reuse

LONGEST = 1.6  # chosen on the demo model's worst pictures (docs/method.md)


@dataclass(frozen=True)
class Adaptive(Reuse):
    """Predict the velocity by a polynomial over σ, as long as the expected error of the latent is below a tolerance.

    The velocity is extrapolated through the last ``order`` + 1 computed ones, at the noise levels σᵢ. At the next
    computed step its difference to what was predicted is the next divided difference in Newton's form of the
    interpolation, D = (v − v̂) / ∏(σ − σᵢ). With it, predicting the steps j from there up to the noise level σ′ is
    expected to move the latent wrongly by

        e = RMS(D) · Σⱼ |Δσⱼ · ∏(σⱼ − σᵢ)|.

    A latent z = (1 − σ) x + σ ε is the picture x at 1 − σ of its size, so what e is to the picture is e / (1 − σ′).
    Steps are predicted while that is below ``tolerance``: the same error of the latent costs more, the noisier it is.
    This is the step-size control of Adams-Bashforth methods (Hairer, Nørsett, Wanner: Solving Ordinary Differential
    Equations I, III.5 and III.7) on the grid of the run's noise levels.

    A computed step then mends what the predicted steps before it have moved wrongly, as far as the higher polynomial
    through its own velocity tells: Σⱼ Δσⱼ · ∏(σⱼ − σᵢ) · D. That is the corrector of an Adams-Moulton method, or of
    UniPC (arXiv 2302.04867), without a call of the model.

    A level's velocities are predicted from that level's own: where levels change, the first steps are computed. While
    there is next to nothing of the picture in the latent, its velocity does not show yet how it will turn. So within a
    stretch the picture's share 1 − σ grows by no more than a factor of `LONGEST`.
    """

    tolerance: float  # of the picture's latent, root mean square
    order: int = 1  # of the polynomial

    name = "adaptive"
    knob = "tolerance"

    def predict(self, history: RunHistory) -> Prediction | None:
        """The polynomial's weights, and whether the expected error allows them."""
        sigmas, step = history.sigmas.astype(float), history.step
        computed = history.computed_at_level()
        nodes = [float(sigmas[one]) for one in computed[: self.order + 1]]
        if len(nodes) <= self.order:
            return None
        since = range(computed[0] + 1, step + 1)
        products = [float(sigmas[j + 1] - sigmas[j]) * newton_product(nodes, float(sigmas[j])) for j in since]
        weights = lagrange_weights(nodes, float(sigmas[step]))
        correction = sum(products[:-1]) / newton_product(nodes, float(sigmas[step]))
        if history.error is None or len(computed) < self.order + 2:
            return Prediction(weights, False, correction)
        before = [float(sigmas[one]) for one in computed[1 : self.order + 2]]
        difference = root_mean_square(history.error) / abs(newton_product(before, nodes[0]))
        share, share_before = 1 - float(sigmas[step + 1]), 1 - float(sigmas[computed[0]])
        expected = difference * sum(map(abs, products)) / share
        enough = expected < self.tolerance and share <= LONGEST * share_before
        return Prediction(weights, enough, correction, {"expected_error": expected})

    def __str__(self) -> str:
        return f"adaptive:tolerance={self.tolerance:g},order={self.order}"
