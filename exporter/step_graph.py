"""The step graph: what happens to the latent after every call of the transformer.

For flow matching an Euler step is z' = z + Δσ·v. The first difference Δ¹ = Δσ·v is known without subtracting latents,
which would lose digits; the second and third are differences of stored ones (DDiT, arXiv 2602.16968; docs/method.md).
Everything is float32: in half precision third differences drown in rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddit.exporter.graphs import GraphJob
from ddit.runtime.bundle import TensorSpec


class StepGraph(nn.Module):
    """Euler update, differences, and for every coarse patch the deviation of the third difference inside each patch."""

    def __init__(self, coarse: Sequence[int]):
        super().__init__()
        self.coarse = tuple(coarse)

    def forward(
        self, latent: Tensor, velocity: Tensor, dt: Tensor, difference1: Tensor, difference2: Tensor
    ) -> tuple[Tensor, ...]:
        """One step.

        Args:
            latent, velocity: (B, C, H, W).
            dt: (B,) the next noise level minus this one.
            difference1, difference2: Δ¹ and Δ² of the step before, zero at first.

        Returns:
            the latent, Δ¹ and Δ² after this step, then for every coarse patch p (B, H/p, W/p): the standard deviation
            of Δ³ over a patch's p·p positions, averaged over the channels. It means something after three steps.
        """
        first = dt[:, None, None, None] * velocity
        second = first - difference1
        third = second - difference2
        return latent + first, first, second, *(patch_deviation(third, patch) for patch in self.coarse)


def patch_deviation(values: Tensor, patch: int) -> Tensor:
    """Population standard deviation inside every patch, averaged over channels: (B, C, H, W) → (B, H/p, W/p)."""
    batch, channels, height, width = values.shape
    grid = values.reshape(batch, channels, height // patch, patch, width // patch, patch)
    centred = grid - grid.mean(dim=(3, 5), keepdim=True)
    return (centred * centred).mean(dim=(3, 5)).sqrt().mean(dim=1)


def step_job(channels: int, coarse: Sequence[int]) -> GraphJob:
    """The export job of a bundle's step graph."""
    coarsest = max(coarse, default=1)
    picture = ("B", channels, "H", "W")

    def state(name: str) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=picture)

    module = StepGraph(coarse)
    return GraphJob(
        name="step",
        module=module,
        inputs=(
            state("latent"),
            state("velocity"),
            TensorSpec(name="dt", dtype="float32", shape=("B",)),
            state("difference1"),
            state("difference2"),
        ),
        outputs=(
            *(state(name) for name in ("next_latent", "next_difference1", "next_difference2")),
            *(TensorSpec(name=f"deviation_{p}", dtype="float32", shape=("B", f"H/{p}", f"W/{p}")) for p in coarse),
        ),
        dtype="fp32",
        values=lambda name: torch.empty(0),
        place=lambda name: ("", name),
        reference=lambda: module,
        trace_sizes={"B": 2, "H": 2 * coarsest, "W": 3 * coarsest},
    )
