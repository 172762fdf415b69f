"""The step graph: what happens to the latent after every call of the transformer.

For flow matching an Euler step is z' = z + Δσ·v. The first difference Δ¹ = Δσ·v is known without subtracting latents,
which would lose digits; the second and third are differences of stored ones (DDiT, arXiv 2602.16968; docs/method.md).
Everything is float32: in half precision third differences drown in rounding.

A multistep solver moves the latent along its estimates of the clean latent, x̂ = z − σ·v, those of the steps before
among them: Δ¹ = Σₖ bₖ (x̂ₖ − z), with coefficients that the host works out (`ddit.runtime.samplers.unipc`). Where only
the newest one counts that is Euler's step, −b₀·σ·v.

A coarse level sees less detail than the native one, so the detail that the last native step found is carried on
(docs/method.md): it replaces a share of the detail in a coarse step's estimate of the clean latent.

The velocities of the last computed steps are kept, so that steps between computed ones can be predicted from them
(`ddit.exporter.steps.prediction`). Every computed step shows what a prediction in its place would have missed, and can
mend with it what the predicted steps before it have moved wrongly.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ddit.exporter.graphs.job import GraphJob, equation_job, floats
from ddit.exporter.steps import equations
from ddit.exporter.steps.patches import patch_detail, patch_deviation, patch_rms, per_sample
from ddit.exporter.steps.prediction import weighted_sum
from ddit.runtime.bundle.manifest import LatentInfo, SamplerInfo
from ddit.runtime.policies.prediction import KEPT_VELOCITIES


class StepGraph(nn.Module):
    """Carried detail, the solver's move, differences and their deviations, kept velocities, the prediction's error."""

    def __init__(self, native: int, coarse: Sequence[int]):
        super().__init__()
        self.native = native
        self.coarse = tuple(coarse)

    def forward(
        self,
        latent: Tensor,
        velocity: Tensor,
        timestep: Tensor,
        difference1: Tensor,
        difference2: Tensor,
        kept_estimate: Tensor,
        velocities: Tensor,
        keep_estimate: Tensor,
        keep_velocity: Tensor,
        prediction: Tensor,
        correction: Tensor,
        carry: Tensor | None = None,
        dt: Tensor | None = None,
        solver: Tensor | None = None,
        estimates: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """One step.

        Args:
            latent, velocity: (B, C, H, W), or (B, C, F, H, W) of a clip; so is whatever else has H and W.
            timestep: (B,) this noise level σ, above 0.
            difference1, difference2: Δ¹ and Δ² of the step before, zero at first.
            kept_estimate: the last native step's estimate of the clean latent.
            velocities: (B, K, C, H, W) the velocities of the last computed steps, the newest first.
            keep_estimate: (B,) 1 after the native level, whose estimate is kept, else 0.
            keep_velocity: (B,) 1 for a computed step, whose velocity is kept, 0 for a predicted one.
            prediction: (B, K) the weights of the kept velocities in what is predicted for this step.
            correction: (B,) Δσ; so much of the prediction's error moves the latent before the step does.
            carry: (B, coarse patches) the share of the kept estimate's detail that replaces this step's own; 0 but in
                the column of the patch that the step ran at. Detail is what the mean of a p×p patch leaves.
            dt: (B,) the next noise level minus this one, for Euler's method.
            solver: (B, 1 + n) b₀, b₁, … of a multistep solver, instead.
            estimates: (B, n, C, H, W) its estimates of the clean latent in the steps before, the newest first.

        Returns:
            the latent, Δ¹, Δ², the estimate and the velocities after this step, and a multistep solver's estimates; the
            root mean square of the prediction's error v − v̂ in every native patch (B, H/p, W/p); then for every coarse
            patch p (B, H/p, W/p): the standard deviation of Δ³ over a patch's p·p positions, averaged over the
            channels. It means something after three steps.
        """
        sigma = per_sample(timestep, latent)
        estimate = latent - sigma * velocity
        for column, patch in enumerate(self.coarse):
            assert carry is not None
            share = per_sample(carry[:, column], latent)
            velocity = velocity + share / sigma * patch_detail(estimate - kept_estimate, patch)
        error = velocity - weighted_sum(velocities, prediction)
        latent = latent + per_sample(correction, latent) * error
        solver_state: tuple[Tensor, ...] = ()
        if solver is None:
            assert dt is not None
            first = per_sample(dt, latent) * velocity
        else:
            assert estimates is not None
            way = -sigma * velocity  # to the newest estimate
            ways = torch.cat([way[:, None], estimates - latent[:, None]], dim=1)
            first = weighted_sum(ways, solver)
            solver_state = (torch.cat([(latent + way)[:, None], estimates[:, :-1]], dim=1),)
        second = first - difference1
        third = second - difference2
        kept = torch.where(per_sample(keep_estimate, latent) > 0, estimate, kept_estimate)
        newest = torch.cat([velocity[:, None], velocities[:, :-1]], dim=1)
        velocities = torch.where(per_sample(keep_velocity, velocities) > 0, newest, velocities)
        return (
            latent + first,
            first,
            second,
            kept,
            velocities,
            *solver_state,
            patch_rms(error, self.native),
            *(patch_deviation(third, patch) for patch in self.coarse),
        )


def step_job(latent: LatentInfo, native: int, coarse: Sequence[int], sampler: SamplerInfo) -> GraphJob:
    """The export job of a bundle's step graph."""
    unit = math.lcm(native, *coarse)
    picture = latent.shape
    state = ("difference1", "difference2", "kept_estimate")
    order = sampler.order if sampler.kind == "flow_unipc" else 0
    estimates = ("B", order, *picture[1:])

    return equation_job(
        "step",
        StepGraph(native, coarse),
        partial(equations.step, native, coarse),
        inputs=(
            *(floats(name, *picture) for name in ("latent", "velocity")),
            floats("timestep", "B"),
            floats("solver", "B", order + 1) if order else floats("dt", "B"),
            *(floats(name, *picture) for name in state),
            floats("velocities", "B", KEPT_VELOCITIES, *picture[1:]),
            *([floats("estimates", *estimates)] if order else []),
            *(floats(name, "B") for name in ("keep_estimate", "keep_velocity")),
            floats("prediction", "B", KEPT_VELOCITIES),
            floats("correction", "B"),
            *([floats("carry", "B", len(coarse))] if coarse else []),
        ),
        outputs=(
            *(floats(f"next_{name}", *picture) for name in ("latent", *state)),
            floats("next_velocities", "B", KEPT_VELOCITIES, *picture[1:]),
            *([floats("next_estimates", *estimates)] if order else []),
            floats("prediction_error", "B", *latent.patch_grid(native)),
            *(floats(f"deviation_{p}", "B", *latent.patch_grid(p)) for p in coarse),
        ),
        trace_sizes={"B": 2, "F": 3, "H": 2 * unit, "W": 3 * unit},
    )
