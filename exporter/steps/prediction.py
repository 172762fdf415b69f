"""The prediction graph: the velocity of a step that runs no level.

The velocity of a sampled path is smooth in the noise level σ, so that it can be predicted from the velocities of the
last computed steps: v̂ = Σₖ wₖ vₖ. The weights are a few numbers that the host works out, so that every way to predict
(the last velocity again, a line or a parabola through the last ones) is the same graph.
"""

from torch import Tensor, nn

from ddit.exporter.graphs.job import GraphJob, equation_job, floats
from ddit.exporter.steps import equations
from ddit.runtime.bundle.manifest import LatentInfo
from ddit.runtime.policies.prediction import KEPT_VELOCITIES


class PredictionGraph(nn.Module):
    """A weighted sum of kept velocities."""

    def forward(self, velocities: Tensor, prediction: Tensor) -> Tensor:
        """The predicted velocity (B, C, H, W).

        Args:
            velocities: (B, K, C, H, W) the velocities of the last computed steps, the newest first.
            prediction: (B, K) their weights.
        """
        return weighted_sum(velocities, prediction)


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """(B, K, …) and (B, K) → (B, …)."""
    shape = (*weights.shape, *(1 for _ in values.shape[2:]))
    return (values * weights.reshape(shape)).sum(dim=1)


def prediction_job(latent: LatentInfo) -> GraphJob:
    """The export job of a bundle's prediction graph."""

    return equation_job(
        "predict",
        PredictionGraph(),
        equations.predict,
        inputs=(
            floats("velocities", "B", KEPT_VELOCITIES, *latent.shape[1:]),
            floats("prediction", "B", KEPT_VELOCITIES),
        ),
        outputs=(floats("velocity", *latent.shape),),
        trace_sizes={"B": 2, "F": 3, "H": 8, "W": 12},
    )
