"""Predicting the velocity of a step from those of computed ones: the arithmetic that policies share.

Noise levels σ are the nodes, the newest first. Everything here is a few numbers on the host; the velocities stay where
they were computed.
"""

from collections.abc import Sequence
from math import prod

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


def newton_product(nodes: Sequence[float], sigma: float) -> float:
    """∏ (σ − node): what the next divided difference is multiplied with in Newton's form of the interpolation."""
    return prod(sigma - node for node in nodes)


def root_mean_square(values: NDArray[np.float32]) -> float:
    """√ of the mean of the squares."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
