"""Predicting the velocity of a step from those of computed ones: the arithmetic that policies share.

Noise levels σ are the nodes, the newest first. Everything here is a few numbers on the host; the velocities stay where
they were computed.
"""

from collections.abc import Sequence
from math import factorial, prod

import numpy as np
from numpy.typing import NDArray

KEPT_VELOCITIES = 3  # that every bundle keeps: enough for a parabola


def lagrange_weights(nodes: Sequence[float], sigma: float) -> tuple[float, ...]:
    """The weights of the values at ``nodes`` in their interpolating polynomial's value at ``sigma`` (Lagrange).

    One node repeats its value, two extrapolate a line, three a parabola.

    >>> lagrange_weights([0.5, 0.75], 0.25)
    (2.0, -1.0)
    """
    return tuple(
        prod((sigma - other) / (node - other) for j, other in enumerate(nodes) if j != i)
        for i, node in enumerate(nodes)
    )


def taylor_weights(steps: Sequence[int], step: int, order: int) -> tuple[float, ...]:
    """The weights of the values at ``steps``, the newest first, in their Taylor expansion at ``step`` (TaylorSeer).

    Derivatives are backward differences over the number of steps between the values. Where these are equal, N, this is
    TaylorSeer's formula (arXiv 2503.06923): Σᵢ Δⁱv / (i! Nⁱ) · kⁱ, with ``step`` k steps after the newest value. The
    order is lower where there are too few values. From the second order on this is not the interpolating polynomial.

    >>> taylor_weights([8, 4, 0], 10, order=1)
    (1.5, -0.5)
    >>> taylor_weights([8, 4, 0], 10, order=2)
    (1.625, -0.75, 0.125)
    """
    known = list(steps[: order + 1])
    derivatives = np.eye(len(known))  # of the present order at every value that has one, as weights of the values
    weights = np.zeros(len(known))
    for power in range(len(known)):
        weights += derivatives[0] * (step - known[0]) ** power / factorial(power)
        distances = np.array([known[i] - known[i + 1] for i in range(len(derivatives) - 1)])
        derivatives = (derivatives[:-1] - derivatives[1:]) / distances[:, None]
    return tuple(weights.tolist())


def newton_product(nodes: Sequence[float], sigma: float) -> float:
    """∏ (σ − node): what the next divided difference is multiplied with in Newton's form of the interpolation."""
    return prod(sigma - node for node in nodes)


def root_mean_square(values: NDArray[np.float32]) -> float:
    """√ of the mean of the squares."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
