"""The step graph: Euler update, differences, deviations."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddit.exporter.step_graph import StepGraph, patch_deviation


def walk(path, times):
    """Follow z(t) by Euler steps whose velocity is the path's own slope; returns the step graph's outputs."""
    graph = StepGraph((4,))
    latent = path(times[0])
    state = [latent, torch.zeros_like(latent), torch.zeros_like(latent)]
    outputs = None
    for now, then in pairwise(times):
        velocity = (path(then) - path(now)) / (then - now)
        outputs = graph(state[0], velocity, torch.tensor([then - now]), state[1], state[2])
        state = list(outputs[:3])
    return state, outputs


@given(h=st.floats(0.05, 0.5), a=st.floats(-2, 2), b=st.floats(-2, 2))
@settings(deadline=None, max_examples=30)
def test_third_difference_of_a_cubic_is_six_h_cubed(h, a, b):
    """The stencil z₃ − 3z₂ + 3z₁ − z₀: 6h³ on t³ whatever is added of lower order, nothing on a quadratic."""
    # half of the patch follows the cubic, half a parabola: the deviation over the patch is half of 6h³
    cubic = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    cubic[..., :2, :] = 1.0
    times = [1 + i * h for i in range(4)]
    _, outputs = walk(lambda t: cubic * t**3 + a * t**2 + b * t, times)
    assert outputs[3].item() == np.float64(3 * h**3).item() or abs(outputs[3].item() / (3 * h**3) - 1) < 1e-6


def test_a_straight_path_is_smooth_in_float32():
    start = torch.randn(1, 16, 32, 32)
    velocity = torch.randn(1, 16, 32, 32)
    _, outputs = walk(lambda t: start + t * velocity, [i / 50 for i in range(6)])
    assert outputs[3].max() < 1e-5


def test_deviation_is_that_of_numpy_per_patch_and_channel():
    values = torch.randn(2, 3, 8, 12)
    deviation = patch_deviation(values, 4)
    assert deviation.shape == (2, 2, 3)
    expected = [values[1, c, 4:8, 8:12].numpy().std() for c in range(3)]
    np.testing.assert_allclose(deviation[1, 1, 2], np.mean(expected), rtol=1e-5)


def test_without_coarse_levels_there_is_no_deviation():
    latent = torch.randn(1, 4, 8, 8)
    outputs = StepGraph(())(latent, latent, torch.tensor([0.5]), latent, latent)
    assert len(outputs) == 3
    assert torch.equal(outputs[0], 1.5 * latent)
