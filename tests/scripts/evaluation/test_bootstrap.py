"""Intervals against the normal distribution's and against values that leave no doubt."""

import math

import numpy as np
import pytest

from evaluation.bootstrap import Estimate, estimate, estimate_ratio


def test_the_interval_of_a_mean_holds_it_and_narrows():
    values = np.random.default_rng(0).normal(size=400)
    few, many = estimate(values[:40], 1), estimate(values, 1)
    assert few.low < few.value < few.high
    assert many.value == pytest.approx(values.mean())
    # the bootstrap's error of a mean is that of the normal distribution: 1.96 σ / √n on either side
    assert many.high - many.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_seeds_of_a_prompt_are_averaged_before_resampling():
    alike = estimate(np.repeat([1.0, 2.0, 4.0], 5), seeds=5)
    assert (alike.low, alike.high) == (1.0, 4.0)  # as three values, not as fifteen
    assert estimate([1.0, 3.0], seeds=2).value == 2.0
    assert math.isnan(estimate([1.0, 3.0], seeds=2).low)


def test_equal_values_have_an_interval_without_width():
    assert estimate([2.0, 2.0, 2.0], 1) == Estimate(2.0, 2.0, 2.0)


def test_a_ratio_is_one_of_totals_with_prompts_in_pairs():
    assert estimate_ratio([4.0, 4.0], [1.0, 3.0], 1).value == 2.0  # the mean of the ratios would be 2.67
    assert estimate_ratio([2.0, 8.0, 4.0], [1.0, 4.0, 2.0], 1) == Estimate(2.0, 2.0, 2.0)  # each prompt has the same
    assert estimate_ratio([4.0, 4.0, 8.0, 8.0], [1.0, 3.0, 4.0, 4.0], 2).low == pytest.approx(2.0)
