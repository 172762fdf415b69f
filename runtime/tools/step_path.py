"""Which steps to compute, by dynamic programming over the costs of predicting the others (DPCache, arXiv 2602.22654).

A step m between computed ones is predicted from the last three, h < i < j, and moves the latent wrongly by

    e(h, i, j → m) = |Δσₘ| · RMS(vₘ − v̂ₘ(h, i, j)),

where v are the velocities of native runs, averaged over these. The paper's cost of going from j to the next computed
step k is a tensor over (i, j, k). Second-order prediction looks at h too, so here the state is all three, and the cost
of a path is exactly the sum of what its own predictions would miss on the native runs. Costs count in units of the
latent, as the paper's do in units of the features.

A prediction is a weighted sum of velocities, so that its error follows from their inner products, and the velocities
themselves are needed once.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ddit.runtime.policies.dpcache import FORCED

Array = NDArray[np.float64]

MOST_STEPS = 100  # the tables grow with the cube of the number of steps


def inner_products(velocities: NDArray[np.float32]) -> Array:
    """Mean products of a run's velocities (T, …) with each other: (T, T)."""
    rows = velocities.reshape(len(velocities), -1).astype(np.float64)
    return rows @ rows.T / rows.shape[1]


def best_path(products: Sequence[Array], sigmas: NDArray[np.float32], count: int) -> tuple[tuple[int, ...], float]:
    """The ``count`` steps to compute, of which the first three are forced, and what the others are expected to miss.

    Args:
        products: `inner_products` of every native run.
        sigmas: their noise levels, one more than there are steps T.
        count: from 3 to T.
    """
    steps = len(sigmas) - 1
    # by how many are computed, and the last three of them: the least cost of the steps before the last
    cost = np.full((count + 1, steps, steps, steps), np.inf, dtype=np.float32)
    came_from = np.zeros(cost.shape, dtype=np.uint8)  # the computed step before these three
    cost[FORCED, 0, 1, 2] = 0.0
    best, end = np.inf, (0, 1, 2)
    for j in range(FORCED - 1, steps):
        missed = segment_costs(products, sigmas, j)
        for done in range(FORCED, count + 1):
            total = cost[done, :j, :j, j, None] + missed  # (h, i, next computed step - j - 1)
            if done < count:
                cost[done + 1, :j, j, j + 1 :] = total[..., :-1].min(axis=0)
                came_from[done + 1, :j, j, j + 1 :] = total[..., :-1].argmin(axis=0)
            elif total[..., -1].min() < best:
                best = float(total[..., -1].min())
                h, i = np.unravel_index(total[..., -1].argmin(), total.shape[:2])
                end = (int(h), int(i), j)
    path = list(end)
    for done in range(count, FORCED, -1):
        path.insert(0, int(came_from[done, path[0], path[1], path[2]]))
    return tuple(path), best


def segment_costs(products: Sequence[Array], sigmas: NDArray[np.float32], j: int) -> Array:
    """What is missed between the computed step j and the next one, by the two computed before j: (j, j, T - j).

    The last axis is the next computed step, from j + 1 on; its last entry is the end of the run. Infinite where the
    first two do not rise.
    """
    steps = len(sigmas) - 1
    h, i = np.arange(j)[:, None, None], np.arange(j)[None, :, None]
    between = np.arange(j + 1, steps)[None, None, :]
    rises = h < i
    # `taylor_weights` of second order, for all h and i at once
    last, before = j - i, np.where(rises, i - h, 1)
    x = (between - j).astype(np.float64)
    curve = x * x / 2
    weights = (
        1 + x / last + curve / last**2,
        -x / last - curve / last * (1 / last + 1 / before),
        curve / last / before,
    )
    missed = np.zeros((j, j, between.size))
    for product in products:
        nodes = (np.full_like(i, j), i, h)
        square = product[between, between] + np.zeros_like(missed)
        for weight, node in zip(weights, nodes, strict=True):
            square -= 2 * weight * product[between, node]
            for other_weight, other in zip(weights, nodes, strict=True):
                square += weight * other_weight * product[node, other]
        missed += np.sqrt(np.maximum(square, 0)) / len(products)
    missed *= np.abs(np.diff(sigmas.astype(np.float64)))[j + 1 :]
    total = np.concatenate([np.zeros((j, j, 1)), np.cumsum(missed, axis=-1)], axis=-1)
    return np.where(rises, total, np.inf)
