"""UniPC (arXiv 2302.04867) along a flow, as diffusers' `UniPCMultistepScheduler` computes it for Wan 2.1.

Of order p, predicting the clean latent x̂, with B(h) = e^h − 1 ("bh2"). A step first corrects the latent with what the
model has just said (UniC), then moves it on (UniP). Both are sums of the estimates x̂ₖ = zₖ − σₖ·vₖ of this step and the
ones before, and their weights with that of the latent add up to 1. So a whole step is Δz = Σₖ bₖ (x̂ₖ − z): the step
graph needs these few numbers, and no latent of an earlier step.
"""

from collections.abc import Sequence
from math import expm1, inf, log

import numpy as np


def coefficients(sigmas: Sequence[float], step: int, first: int, order: int) -> tuple[float, ...]:
    """b₀, b₁, …, b_order of a step: the weights of this step's estimate, of the one before, and so on.

    The first steps of a run have no estimates to look back to, and the last ones do not look as far ahead: there the
    order is lower (diffusers' ``lower_order_final``).

    Args:
        sigmas: the run's noise levels, the last one 0.
        step: its number.
        first: the number of the run's first step: what lies before is not known.
        order: 1 or 2.
    """
    weights = np.zeros(order + 1)
    after, now = sigmas[step + 1], sigmas[step]
    share = after / now  # of the corrected latent in the next one
    if step > first:
        weights[: _order(sigmas, step - 1, first, order) + 1] = share * _correction(sigmas, step, first, order)
    weights[0] += 1 - share
    if _order(sigmas, step, first, order) == 2:
        h = _log_snr(after) - _log_snr(now)
        ratio = (_log_snr(sigmas[step - 1]) - _log_snr(now)) / h
        slope = -(1 - after) * expm1(-h) / (2 * ratio)
        weights[:2] += -slope, slope
    return tuple(weights.tolist())


def _order(sigmas: Sequence[float], step: int, first: int, order: int) -> int:
    """Of a step's move."""
    return min(order, step - first + 1, len(sigmas) - 1 - step)


def _correction(
    sigmas: Sequence[float], step: int, first: int, order: int
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """What the corrector adds to a step's latent, as weights of the estimates; they add up to 0.

    It is the difference between UniC's and UniP's formulas for the step before.
    """
    now, before = sigmas[step], sigmas[step - 1]
    h = _log_snr(now) - _log_snr(before)
    scale = -(1 - now) * expm1(-h)
    if _order(sigmas, step - 1, first, order) == 1:
        return scale / 2 * np.array([1.0, -1.0])
    ratio = (_log_snr(sigmas[step - 2]) - _log_snr(before)) / h
    phi_2 = expm1(-h) / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    older, newest = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], [phi_2 / expm1(-h), 2 * phi_3 / expm1(-h)])
    older = (older - 1 / 2) / ratio  # UniP of order 2 takes a half
    return scale * np.array([newest, -newest - older, older])


def _log_snr(sigma: float) -> float:
    """λ: half the logarithm of the signal-to-noise ratio."""
    return log((1 - sigma) / sigma) if sigma > 0 else inf
