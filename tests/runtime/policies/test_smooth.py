"""What τ is relative to: measured from native runs, read at any noise levels."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddit.runtime.errors import UsageError
from ddit.runtime.policies import Adaptive, Dynamic, RunHistory, parse_schedule
from ddit.runtime.policies.parse import Choices
from ddit.runtime.policies.smooth import SMOOTH, measure_smooth, smooth_at, step_lengths

SIGMAS = np.array([1.0, 0.9, 0.75, 0.6, 0.4, 0.2, 0.0], np.float32)
STEPS = len(SIGMAS) - 1


def runs(scales=(1.0, 2.0, 3.0, 4.0, 5.0)) -> list[list[dict[int, float]]]:
    """Pictures that differ in detail by a factor; the first two steps have no third difference."""
    return [[{} if i < 2 else {4: s * (i + 1) * 1e-4, 8: s * (i + 2) * 1e-4} for i in range(STEPS)] for s in scales]


def relative(tau: float) -> Dynamic:
    return Dynamic(2, (4, 8), tau, 0.4, 3, smooth=smooth_at(measure_smooth(runs(), SIGMAS), SIGMAS))


def test_the_curve_is_a_smooth_picture_s_statistic_at_every_step():
    curves = smooth_at(measure_smooth(runs(), SIGMAS), SIGMAS)
    assert SMOOTH == 0.25  # between the first and the second of five pictures: the second
    for step in range(2, STEPS):
        assert curves[4][step] == pytest.approx(2 * (step + 1) * 1e-4, rel=1e-5)
        assert curves[8][step] == pytest.approx(2 * (step + 2) * 1e-4, rel=1e-5)


@given(st.integers(8, 60))
def test_other_numbers_of_steps_have_the_differences_of_their_length(steps):
    """A cubic's third difference is the same everywhere, but for the cube of the step's length."""
    even = np.linspace(1, 0, 21, dtype=np.float32)
    points = measure_smooth([[{} if i < 2 else {4: 6 * 0.05**3} for i in range(20)]], even)
    other = np.linspace(1, 0, steps + 1, dtype=np.float32)
    assert np.allclose(smooth_at(points, other)[4], 6 / steps**3, rtol=1e-3)


def test_a_difference_spans_three_steps():
    assert step_lengths(SIGMAS)[:4] == pytest.approx([0.1, 0.125, 0.4 / 3, 0.5 / 3], rel=1e-5)


def test_a_picture_without_any_difference_is_no_error():
    flat = [[{} if i < 2 else {4: 0.0} for i in range(STEPS)]]
    assert all(0 <= value < 1e-20 for value in smooth_at(measure_smooth(flat, SIGMAS), SIGMAS)[4])


@pytest.mark.parametrize(("tau", "scale", "level"), [(2.0, 3.9, 8), (2.0, 4.1, 2), (0.4, 1.0, 2), (0.6, 1.0, 8)])
def test_tau_is_a_multiple_of_it(tau, scale, level):
    schedule = relative(tau)
    for done in range(3, STEPS):
        statistics = runs((scale,))[0][done - 1]
        deviations = {patch: np.full((2, 2), value, np.float32) for patch, value in statistics.items()}
        assert schedule.decide(RunHistory(SIGMAS, levels=[2] * done, deviations=deviations)).level == level


def test_the_paper_s_rule_can_be_asked_for():
    default = relative(3.0)
    choices = Choices((2, 4, 8), 2, default, Adaptive(0.04))
    assert parse_schedule("dynamic", choices) == default
    absolute = parse_schedule("dynamic:absolute=1,tau=0.001", choices)
    assert absolute == replace(default, tau=0.001, smooth=None)
    assert parse_schedule(str(absolute), choices) == absolute
    assert parse_schedule(str(default), choices) == default
    with pytest.raises(UsageError, match="an absolute tau must be given"):
        parse_schedule("dynamic:absolute=1", choices)
