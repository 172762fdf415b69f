"""The equations of the graphs around the levels in NumPy and float64 (docs/method.md): what these are compared with."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn, idctn

Array = NDArray[np.float64]


def step(
    native: int,
    coarse: Sequence[int],
    *,
    latent: Array,
    velocity: Array,
    timestep: Array,
    dt: Array,
    difference1: Array,
    difference2: Array,
    kept_estimate: Array,
    velocities: Array,
    keep_estimate: Array,
    keep_velocity: Array,
    prediction: Array,
    correction: Array,
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
        error = v - predict(velocities=velocities[i : i + 1], prediction=prediction[i : i + 1])[0]
        delta1 = dt[i] * v
        delta2 = delta1 - difference1[i]
        delta3 = delta2 - difference2[i]
        kept = estimate if keep_estimate[i] > 0 else kept_estimate[i]
        newest = np.stack([v, *velocities[i, :-1]]) if keep_velocity[i] > 0 else velocities[i]
        missed = np.sqrt((patches(error, native) ** 2).mean(axis=(0, -1)))
        deviations = (patches(delta3, p).std(-1).mean(0) for p in coarse)
        moved = latent[i] + correction[i] * error + delta1
        rows.append((moved, delta1, delta2, kept, newest, missed, *deviations))
    return tuple(np.stack(values) for values in zip(*rows, strict=True))


def predict(*, velocities: Array, prediction: Array) -> Array:
    """The weighted sum of the kept velocities, sample by sample."""
    return np.stack([sum(w * v for w, v in zip(*one, strict=True)) for one in zip(prediction, velocities, strict=True)])


def grow(small: tuple[int, int], *, latent: Array, noise: Array, timestep: Array, gain: Array) -> Array:
    """The larger latents, sample by sample, of small ones (h, w) that lie in the low corner of ``latent``."""
    h, w = small
    coefficients = timestep[:, None, None, None] * noise
    coefficients[:, :, :h, :w] = dctn(latent[:, :, :h, :w], type=2, norm="ortho", axes=(2, 3))
    grown: Array = gain[:, None, None, None] * idctn(coefficients, type=2, norm="ortho", axes=(2, 3))
    return grown


def patches(values: Array, p: int) -> Array:
    """The values of every patch, side by side: (C, H, W) → (C, H/p, W/p, p·p)."""
    windows = np.lib.stride_tricks.sliding_window_view(values, (p, p), axis=(1, 2))[:, ::p, ::p]
    return windows.reshape(*windows.shape[:3], p * p)
