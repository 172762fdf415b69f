"""The guide graph: a level's two passes, with the prompt and with another one, become one velocity.

Classifier-free guidance (arXiv 2207.12598), as diffusers computes it: v = v₋ + s·(v₊ − v₋).
"""

from torch import Tensor, nn

from ddit.exporter.graphs.job import GraphJob, equation_job, floats
from ddit.exporter.steps import equations
from ddit.exporter.steps.patches import per_sample
from ddit.runtime.bundle.manifest import LatentInfo


class GuideGraph(nn.Module):
    """Away from what the other prompt leads to."""

    def forward(self, velocity_conditional: Tensor, velocity_unconditional: Tensor, guidance: Tensor) -> Tensor:
        """The guided velocity.

        Args:
            velocity_conditional: (B, C, …) of the pass with the prompt.
            velocity_unconditional: that of the pass with the negative one.
            guidance: (B,) the scale s.
        """
        away = velocity_conditional - velocity_unconditional
        return velocity_unconditional + per_sample(guidance, away) * away


def guidance_job(latent: LatentInfo) -> GraphJob:
    """The export job of the guide graph."""

    return equation_job(
        "guide",
        GuideGraph(),
        equations.guide,
        inputs=(
            floats("velocity_conditional", *latent.shape),
            floats("velocity_unconditional", *latent.shape),
            floats("guidance", "B"),
        ),
        outputs=(floats("velocity", *latent.shape),),
        trace_sizes={"B": 2, "F": 3, "H": 8, "W": 12},
    )
