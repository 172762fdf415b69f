"""The step graph: what happens to the latent after every call of the transformer.

For flow matching an Euler step is z' = z + Δσ·v. The first difference Δ¹ = Δσ·v is known without subtracting latents,
which would lose digits; the second and third are differences of stored ones (DDiT, arXiv 2602.16968; docs/method.md).
Everything is float32: in half precision third differences drown in rounding.

A coarse level sees less detail than the native one, so the detail that the last native step found is carried on
(docs/method.md): it replaces a share of the detail in a coarse step's estimate of the clean latent.

The velocities of the last computed steps are kept, so that steps between computed ones can be predicted from them
(`ddit.exporter.steps.prediction`). Every computed step shows what a prediction in its place would have missed, and can
mend with it what the predicted steps before it have moved wrongly.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddit.exporter.graphs.job import GraphJob, Original, floats
from ddit.exporter.steps import equations
from ddit.exporter.steps.prediction import weighted_sum
from ddit.runtime.policies.prediction import KEPT_VELOCITIES


class StepGraph(nn.Module):
    """Carried detail, Euler update, differences and their deviations, kept velocities and the prediction's error."""

    def __init__(self, native: int, coarse: Sequence[int]):
        super().__init__()
        self.native = native
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
        velocities: Tensor,
        keep_estimate: Tensor,
        keep_velocity: Tensor,
        prediction: Tensor,
        correction: Tensor,
        carry: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """One step.

        Args:
            latent, velocity: (B, C, H, W).
            timestep: (B,) this noise level σ, above 0.
            dt: (B,) the next noise level minus this one.
            difference1, difference2: Δ¹ and Δ² of the step before, zero at first.
            kept_estimate: the last native step's estimate of the clean latent.
            velocities: (B, K, C, H, W) the velocities of the last computed steps, the newest first.
            keep_estimate: (B,) 1 after the native level, whose estimate is kept, else 0.
            keep_velocity: (B,) 1 for a computed step, whose velocity is kept, 0 for a predicted one.
            prediction: (B, K) the weights of the kept velocities in what is predicted for this step.
            correction: (B,) Δσ; so much of the prediction's error moves the latent before the step does.
            carry: (B, coarse patches) the share of the kept estimate's detail that replaces this step's own; 0 but in
                the column of the patch that the step ran at. Detail is what the mean of a p×p patch leaves.

        Returns:
            the latent, Δ¹, Δ², the estimate and the velocities after this step; the root mean square of the
            prediction's error v − v̂ in every native patch (B, H/p, W/p); then for every coarse patch p (B, H/p, W/p):
            the standard deviation of Δ³ over a patch's p·p positions, averaged over the channels. It means something
            after three steps.
        """
        sigma = timestep[:, None, None, None]
        estimate = latent - sigma * velocity
        for column, patch in enumerate(self.coarse):
            assert carry is not None
            share = carry[:, column, None, None, None]
            velocity = velocity + share / sigma * patch_detail(estimate - kept_estimate, patch)
        error = velocity - weighted_sum(velocities, prediction)
        latent = latent + correction[:, None, None, None] * error
        first = dt[:, None, None, None] * velocity
        second = first - difference1
        third = second - difference2
        kept = torch.where(keep_estimate[:, None, None, None] > 0, estimate, kept_estimate)
        newest = torch.cat([velocity[:, None], velocities[:, :-1]], dim=1)
        velocities = torch.where(keep_velocity[:, None, None, None, None] > 0, newest, velocities)
        return (
            latent + first,
            first,
            second,
            kept,
            velocities,
            patch_rms(error, self.native),
            *(patch_deviation(third, patch) for patch in self.coarse),
        )


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


def patch_rms(values: Tensor, patch: int) -> Tensor:
    """Root mean square over the channels and positions of every patch: (B, C, H, W) → (B, H/p, W/p)."""
    batch, channels, height, width = values.shape
    grid = values.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return (grid * grid).mean(dim=(1, 3, 5)).sqrt()


def step_job(channels: int, native: int, coarse: Sequence[int]) -> GraphJob:
    """The export job of a bundle's step graph."""
    unit = math.lcm(native, *coarse)
    picture = ("B", channels, "H", "W")
    state = ("difference1", "difference2", "kept_estimate")

    def original(device: torch.device) -> Original:
        def compute(**inputs: Tensor) -> tuple[Tensor, ...]:
            arrays = {name: value.double().cpu().numpy() for name, value in inputs.items()}
            return tuple(map(torch.from_numpy, equations.step(native, coarse, **arrays)))

        return compute

    return GraphJob(
        name="step",
        module=StepGraph(native, coarse),
        inputs=(
            *(floats(name, *picture) for name in ("latent", "velocity")),
            *(floats(name, "B") for name in ("timestep", "dt")),
            *(floats(name, *picture) for name in state),
            floats("velocities", "B", KEPT_VELOCITIES, *picture[1:]),
            *(floats(name, "B") for name in ("keep_estimate", "keep_velocity")),
            floats("prediction", "B", KEPT_VELOCITIES),
            floats("correction", "B"),
            *([floats("carry", "B", len(coarse))] if coarse else []),
        ),
        outputs=(
            *(floats(f"next_{name}", *picture) for name in ("latent", *state)),
            floats("next_velocities", "B", KEPT_VELOCITIES, *picture[1:]),
            floats("prediction_error", "B", f"H/{native}", f"W/{native}"),
            *(floats(f"deviation_{p}", "B", f"H/{p}", f"W/{p}") for p in coarse),
        ),
        dtype="fp32",
        values=lambda name: torch.empty(0),
        place=lambda name: ("", name),
        original=original,
        trace_sizes={"B": 2, "H": 2 * unit, "W": 3 * unit},
    )
