"""The step graph: Euler update, differences, deviations."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddit.exporter.steps.patches import patch_detail, patch_deviation
from ddit.exporter.steps.update import StepGraph

KEPT = 3


def run(graph: StepGraph, latent: torch.Tensor, velocity: torch.Tensor, **given: torch.Tensor):
    """The graph's outputs; what is not given is zero."""
    count = len(latent)
    rows = {name: torch.zeros(count) for name in ("timestep", "dt", "keep_estimate", "keep_velocity", "correction")}
    state = {name: torch.zeros_like(latent) for name in ("difference1", "difference2", "kept_estimate")}
    kept = {"velocities": latent.new_zeros(count, KEPT, *latent.shape[1:]), "prediction": torch.zeros(count, KEPT)}
    carry = {"carry": torch.zeros(count, len(graph.coarse))} if graph.coarse else {}
    return graph(latent, velocity, **{**rows, **state, **kept, **carry, **given})


def walk(path, times):
    """Follow z(t) by Euler steps whose velocity is the path's own slope; returns the step graph's outputs."""
    graph = StepGraph(2, (4,))
    latent = path(times[0])
    state, outputs = {}, None
    for now, then in pairwise(times):
        velocity = (path(then) - path(now)) / (then - now)
        outputs = run(graph, latent, velocity, timestep=torch.ones(1), dt=torch.tensor([then - now]), **state)
        latent = outputs[0]
        state = dict(zip(("difference1", "difference2", "kept_estimate"), outputs[1:4], strict=True))
    return outputs


@given(h=st.floats(0.05, 0.5), a=st.floats(-2, 2), b=st.floats(-2, 2))
@settings(deadline=None, max_examples=30)
def test_third_difference_of_a_cubic_is_six_h_cubed(h, a, b):
    """The stencil z₃ − 3z₂ + 3z₁ − z₀: 6h³ on t³ whatever is added of lower order, nothing on a quadratic."""
    # half of the patch follows the cubic, half a parabola: the deviation over the patch is half of 6h³
    cubic = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    cubic[..., :2, :] = 1.0
    times = [1 + i * h for i in range(4)]
    outputs = walk(lambda t: cubic * t**3 + a * t**2 + b * t, times)
    assert outputs[6].item() == np.float64(3 * h**3).item() or abs(outputs[6].item() / (3 * h**3) - 1) < 1e-6


def test_a_straight_path_is_smooth_in_float32():
    start = torch.randn(1, 16, 32, 32)
    velocity = torch.randn(1, 16, 32, 32)
    outputs = walk(lambda t: start + t * velocity, [i / 50 for i in range(6)])
    assert outputs[6].max() < 1e-5


def test_deviation_is_that_of_numpy_per_patch_and_channel():
    values = torch.randn(2, 3, 8, 12)
    deviation = patch_deviation(values, 4)
    assert deviation.shape == (2, 2, 3)
    expected = [values[1, c, 4:8, 8:12].numpy().std() for c in range(3)]
    np.testing.assert_allclose(deviation[1, 1, 2], np.mean(expected), rtol=1e-5)


def test_without_coarse_levels_there_is_no_deviation():
    latent, half = torch.randn(1, 4, 8, 8), torch.tensor([0.5])
    outputs = run(StepGraph(2, ()), latent, latent, timestep=half, dt=half)
    assert len(outputs) == 6
    assert torch.equal(outputs[0], 1.5 * latent)


SIGMA = torch.tensor([0.5, 0.25])


def step(*, clean: torch.Tensor, refresh: float, carry: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of two samples straight to σ = 0: where it ends, the estimate kept, and what it was to estimate."""
    generator = torch.Generator().manual_seed(0)
    latent, velocity = torch.randn(2, 2, 3, 16, 16, generator=generator)
    weights = {"keep_estimate": torch.full((2,), refresh), "carry": torch.tensor([carry, carry])}
    graph = StepGraph(2, (4, 8))
    end, _, _, kept, *_ = run(graph, latent, velocity, timestep=SIGMA, dt=-SIGMA, kept_estimate=clean, **weights)
    return end, kept, latent - SIGMA[:, None, None, None] * velocity


def test_a_native_step_is_plain_and_its_estimate_is_kept():
    end, kept, estimate = step(clean=torch.randn(2, 3, 16, 16), refresh=1.0, carry=[0.0, 0.0])
    torch.testing.assert_close(end, estimate)
    torch.testing.assert_close(kept, estimate)


@given(share=st.floats(0, 1), patch=st.sampled_from([4, 8]))
@settings(deadline=None, max_examples=20)
def test_a_coarse_step_takes_a_share_of_the_kept_detail_and_no_more(share, patch):
    """A step to σ = 0 ends at the estimate of the clean latent: patch means of its own, the rest mixed."""
    clean = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    end, kept, estimate = step(clean=clean, refresh=0.0, carry=[share * (patch == 4), share * (patch == 8)])
    assert torch.equal(kept, clean)
    own, theirs = patch_detail(estimate, patch), patch_detail(clean, patch)
    torch.testing.assert_close(end - patch_detail(end, patch), estimate - own, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(patch_detail(end, patch), (1 - share) * own + share * theirs, atol=1e-5, rtol=1e-4)


def test_a_computed_step_keeps_its_velocity_and_a_predicted_one_does_not():
    latent, velocity = torch.randn(2, 2, 3, 8, 8)
    before = torch.randn(2, KEPT, 3, 8, 8)
    kept = run(StepGraph(2, ()), latent, velocity, velocities=before, keep_velocity=torch.tensor([1.0, 0.0]))[4]
    assert torch.equal(kept[0], torch.stack([velocity[0], before[0, 0], before[0, 1]]))
    assert torch.equal(kept[1], before[1])


def test_a_prediction_s_error_is_measured_in_every_native_patch_and_mends_the_latent():
    latent, velocity = torch.randn(2, 2, 3, 8, 12)
    before, weights = torch.randn(2, KEPT, 3, 8, 12), torch.tensor([[2.0, -1.0, 0.0], [3.0, -3.0, 1.0]])
    more = {"velocities": before, "prediction": weights, "dt": torch.tensor([-0.1, -0.2])}
    plain = run(StepGraph(4, ()), latent, velocity, **more)
    mended = run(StepGraph(4, ()), latent, velocity, correction=torch.tensor([0.3, 0.0]), **more)
    error = velocity[0] - (2 * before[0, 0] - before[0, 1])
    assert plain[5].shape == (2, 2, 3)
    torch.testing.assert_close(plain[5][0, 1, 2], error[:, 4:8, 8:12].square().mean().sqrt())
    torch.testing.assert_close(mended[0][0], plain[0][0] + 0.3 * error)
    assert torch.equal(mended[0][1], plain[0][1])
