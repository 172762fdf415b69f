"""How sure a figure over prompts is: bootstrap intervals of means and of ratios of totals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap

FloatArray = NDArray[np.float64]
Statistic = Callable[..., Any]

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence interval; NaN where one prompt is all there is."""

    value: float
    low: float
    high: float


def estimate(values: ArrayLike, seeds: int) -> Estimate:
    """The mean over prompts, with the percentile bootstrap's 95 % interval (Efron 1979; 2,000 resamples).

    ``values`` holds the ``seeds`` pictures of every prompt one after another. They are averaged first: pictures of one
    prompt are alike, so resampling them singly would make the interval too narrow.
    """
    return _bootstrap(np.mean, _by_prompt(values, seeds))


def estimate_ratio(numerators: ArrayLike, denominators: ArrayLike, seeds: int) -> Estimate:
    """One total over another, prompts resampled in pairs; the rest as for `estimate`."""
    return _bootstrap(_ratio, _by_prompt(numerators, seeds), _by_prompt(denominators, seeds))


def _ratio(numerators: FloatArray, denominators: FloatArray, axis: int = -1) -> FloatArray:
    ratio: FloatArray = np.sum(numerators, axis=axis) / np.sum(denominators, axis=axis)
    return ratio


def _by_prompt(values: ArrayLike, seeds: int) -> FloatArray:
    means: FloatArray = np.asarray(values, dtype=np.float64).reshape(-1, seeds).mean(axis=1)
    return means


def _bootstrap(statistic: Statistic, *samples: FloatArray) -> Estimate:
    value = float(statistic(*samples))
    if len(samples[0]) < 2:
        return Estimate(value, float("nan"), float("nan"))
    interval = bootstrap(
        samples,
        statistic,
        paired=True,
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        method="percentile",  # unlike BCa it is defined where all values are equal
        vectorized=True,
        rng=0,
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))
