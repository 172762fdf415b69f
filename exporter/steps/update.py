"""The step graph: what happens to the latent after every call of the transformer.

For flow matching an Euler step is z' = z + Δσ·v. The first difference Δ¹ = Δσ·v is known without subtracting latents,
which would lose digits; the second and third are differences of stored ones (DDiT, arXiv 2602.16968; docs/method.md).
Everything is float32: in half precision third differences drown in rounding.

A coarse level sees less detail than the native one, so the detail that the last native step found is carried on
(docs/method.md): it replaces a share of the detail in a coarse step's estimate of the clean latent.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddit.exporter.graphs.job import GraphJob, Original, floats
from ddit.exporter.steps import equations


class StepGraph(nn.Module):
    """Carried detail, Euler update, differences, and the deviations of the third difference inside coarse patches."""

    def __init__(self, coarse: Sequence[int]):
        super().__init__()
        self.coarse = tuple(coarse)

    def forward(
        self,
        latent: Tensor,
        velocity: Tensor,
        timestep: Tensor,
        dt: Tensor,
        difference1: Tensor,
        difference2: Tensor,
        kept_estimate: Tensor,
        keep_estimate: Tensor,
        carry: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """One step.

        Args:
            latent, velocity: (B, C, H, W).
            timestep: (B,) this noise level σ, above 0.
            dt: (B,) the next noise level minus this one.
            difference1, difference2: Δ¹ and Δ² of the step before, zero at first.
            kept_estimate: the last native step's estimate of the clean latent.
            keep_estimate: (B,) 1 after the native level, whose estimate is kept, else 0.
            carry: (B, coarse patches) the share of the kept estimate's detail that replaces this step's own; 0 but in
                the column of the patch that the step ran at. Detail is what the mean of a p×p patch leaves.

        Returns:
            the latent, Δ¹, Δ² and the estimate after this step, then for every coarse patch p (B, H/p, W/p): the
            standard deviation of Δ³ over a patch's p·p positions, averaged over the channels. It means something after
            three steps.
        """
        sigma = timestep[:, None, None, None]
        estimate = latent - sigma * velocity
        for column, patch in enumerate(self.coarse):
            assert carry is not None
            share = carry[:, column, None, None, None]
            velocity = velocity + share / sigma * patch_detail(estimate - kept_estimate, patch)
        first = dt[:, None, None, None] * velocity
        second = first - difference1
        third = second - difference2
        kept = torch.where(keep_estimate[:, None, None, None] > 0, estimate, kept_estimate)
        return latent + first, first, second, kept, *(patch_deviation(third, patch) for patch in self.coarse)


def patch_detail(values: Tensor, patch: int) -> Tensor:
    """The values minus the mean of their patch: (B, C, H, W) → the same shape."""
    batch, channels, height, width = values.shape
    grid = values.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return (grid - grid.mean(dim=(3, 5), keepdim=True)).reshape(values.shape)


def patch_deviation(values: Tensor, patch: int) -> Tensor:
    """Population standard deviation inside every patch, averaged over channels: (B, C, H, W) → (B, H/p, W/p)."""
    batch, channels, height, width = values.shape
    grid = values.reshape(batch, channels, height // patch, patch, width // patch, patch)
    centred = grid - grid.mean(dim=(3, 5), keepdim=True)
    return (centred * centred).mean(dim=(3, 5)).sqrt().mean(dim=1)


def step_job(channels: int, coarse: Sequence[int]) -> GraphJob:
    """The export job of a bundle's step graph."""
    unit = math.lcm(*coarse)
    picture = ("B", channels, "H", "W")
    state = ("difference1", "difference2", "kept_estimate")

    def original(device: torch.device) -> Original:
        def compute(**inputs: Tensor) -> tuple[Tensor, ...]:
            arrays = {name: value.double().cpu().numpy() for name, value in inputs.items()}
            return tuple(map(torch.from_numpy, equations.step(coarse, **arrays)))

        return compute

    return GraphJob(
        name="step",
        module=StepGraph(coarse),
        inputs=(
            *(floats(name, *picture) for name in ("latent", "velocity")),
            *(floats(name, "B") for name in ("timestep", "dt")),
            *(floats(name, *picture) for name in state),
            floats("keep_estimate", "B"),
            *([floats("carry", "B", len(coarse))] if coarse else []),
        ),
        outputs=(
            *(floats(f"next_{name}", *picture) for name in ("latent", *state)),
            *(floats(f"deviation_{p}", "B", f"H/{p}", f"W/{p}") for p in coarse),
        ),
        dtype="fp32",
        values=lambda name: torch.empty(0),
        place=lambda name: ("", name),
        original=original,
        trace_sizes={"B": 2, "H": 2 * unit, "W": 3 * unit},
    )
