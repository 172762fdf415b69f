"""The step graph's equations in NumPy and float64 (docs/method.md): what the exported graph is compared with."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def step(
    coarse: Sequence[int],
    *,
    latent: Array,
    velocity: Array,
    timestep: Array,
    dt: Array,
    difference1: Array,
    difference2: Array,
    kept_estimate: Array,
    keep_estimate: Array,
    carry: Array | None = None,
) -> tuple[Array, ...]:
    """One step, sample by sample; inputs and outputs are those of `ddit.exporter.steps.update.StepGraph`."""
    rows = []
    for i in range(len(latent)):
        estimate = latent[i] - timestep[i] * velocity[i]
        v = velocity[i]
        for column, p in enumerate(coarse):
            assert carry is not None
            share = carry[i, column]
            difference = estimate - kept_estimate[i]
            v = v + share / timestep[i] * (difference - np.kron(patches(difference, p).mean(-1), np.ones((p, p))))
        delta1 = dt[i] * v
        delta2 = delta1 - difference1[i]
        delta3 = delta2 - difference2[i]
        kept = estimate if keep_estimate[i] > 0 else kept_estimate[i]
        deviations = (patches(delta3, p).std(-1).mean(0) for p in coarse)
        rows.append((latent[i] + delta1, delta1, delta2, kept, *deviations))
    return tuple(np.stack(values) for values in zip(*rows, strict=True))


def patches(values: Array, p: int) -> Array:
    """The values of every patch, side by side: (C, H, W) → (C, H/p, W/p, p·p)."""
    windows = np.lib.stride_tricks.sliding_window_view(values, (p, p), axis=(1, 2))[:, ::p, ::p]
    return windows.reshape(*windows.shape[:3], p * p)
