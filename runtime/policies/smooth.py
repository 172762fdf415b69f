"""What τ is relative to: the dynamic schedule's statistics of smooth pictures, as a curve over the noise level.

One τ for a whole run does not fit: the third difference of any picture, a plain one too, changes by a factor of ten
and more between the first, the middle and the last noise levels. Relative to smooth pictures at the same noise level
it says how much detail there is. The curve is divided by the cube of the step's length, with which a third difference
grows, so that it serves other numbers of steps too. The paper (arXiv 2602.16968) knows an absolute τ only.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ddit.runtime.bundle.manifest import SmoothPoint
from ddit.runtime.policies.base import DIFFERENCE_ORDER

SMOOTH = 0.25  # the quantile over the pictures that stands for a smooth one
LEAST = 1e-30  # a picture without any third difference has a logarithm too

Statistics = Mapping[int, float]  # of one step, by coarse patch


def measure_smooth(runs: Sequence[Sequence[Statistics]], sigmas: NDArray[np.float32]) -> tuple[SmoothPoint, ...]:
    """The curve of native runs, from the statistics after every step of each; those of the first two steps are empty.

    ``sigmas`` are the noise levels of all runs, one more than there are steps.
    """
    lengths = step_lengths(sigmas)
    points = []
    for step in range(DIFFERENCE_ORDER - 1, len(sigmas) - 1):
        patches = runs[0][step]
        smooth = {patch: float(np.quantile([run[step][patch] for run in runs], SMOOTH)) for patch in patches}
        cube = lengths[step] ** DIFFERENCE_ORDER
        points.append(SmoothPoint(sigma=float(sigmas[step]), statistic={p: v / cube for p, v in smooth.items()}))
    return tuple(points)


def smooth_at(points: Sequence[SmoothPoint], sigmas: NDArray[np.float32]) -> dict[int, tuple[float, ...]]:
    """By coarse patch the statistic of a smooth picture after every step at these noise levels."""
    rising = sorted(points, key=lambda point: point.sigma)
    known = np.array([point.sigma for point in rising])
    cubes = step_lengths(sigmas) ** DIFFERENCE_ORDER
    curves = {}
    for patch in rising[0].statistic:
        values = np.log(np.maximum([point.statistic[patch] for point in rising], LEAST))
        curve = np.exp(np.interp(sigmas[:-1].astype(np.float64), known, values)) * cubes
        curves[patch] = tuple(curve.tolist())
    return curves


def step_lengths(sigmas: NDArray[np.float32]) -> NDArray[np.float64]:
    """The mean length in σ of the steps that a third difference spans, by the last of them."""
    lengths = -np.diff(sigmas.astype(np.float64))
    return np.array([lengths[max(0, i + 1 - DIFFERENCE_ORDER) : i + 1].mean() for i in range(len(lengths))])
