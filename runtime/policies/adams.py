"""A second-order solver: the usual way to need fewer steps, and the control for every method of reuse."""

from dataclasses import dataclass

from ddit.runtime.policies.base import RunHistory
from ddit.runtime.policies.reuse import Prediction, Reuse


@dataclass(frozen=True)
class Adams(Reuse):
    """Adams-Bashforth of order 2 in place of Euler's method; every step is computed.

    z′ = z + h·((1 + r/2)·v − (r/2)·v₁), where v₁ is the velocity of the step before, h this step's Δσ and r its ratio
    to the last one's (Hairer, Nørsett, Wanner: Solving Ordinary Differential Equations I, III.5). It is Euler's step
    and a correction of h·r/2 · (v − v₁). The first step is Euler's.
    """

    name = "adams"

    def predict(self, history: RunHistory) -> Prediction | None:
        """The last velocity, of which nothing is reused, and how far the difference to it moves the latent."""
        if not history.levels:
            return None
        before, now, after = (float(sigma) for sigma in history.sigmas[history.step - 1 : history.step + 2])
        return Prediction((1.0,), False, correction=(after - now) ** 2 / (now - before) / 2)

    def __str__(self) -> str:
        return "adams"
