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
    difference1: Array,
    difference2: Array,
    kept_estimate: Array,
    velocities: Array,
    keep_estimate: Array,
    keep_velocity: Array,
    prediction: Array,
    correction: Array,
    carry: Array | None = None,
    dt: Array | None = None,
    solver: Array | None = None,
    estimates: Array | None = None,
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
        z, memory = latent[i] + correction[i] * error, []
        if solver is None:
            assert dt is not None
            delta1 = dt[i] * v
        else:
            assert estimates is not None
            known = [z - timestep[i] * v, *estimates[i]]
            delta1 = sum(b * (x - z) for b, x in zip(solver[i], known, strict=True))
            memory = [np.stack(known[:-1])]
        delta2 = delta1 - difference1[i]
        delta3 = delta2 - difference2[i]
        kept = estimate if keep_estimate[i] > 0 else kept_estimate[i]
        newest = np.stack([v, *velocities[i, :-1]]) if keep_velocity[i] > 0 else velocities[i]
        missed = np.sqrt((patches(error, native) ** 2).mean(axis=(0, -1)))
        deviations = (patches(delta3, p).std(-1).mean(0) for p in coarse)
        rows.append((z + delta1, delta1, delta2, kept, newest, *memory, missed, *deviations))
    return tuple(np.stack(values) for values in zip(*rows, strict=True))


def predict(*, velocities: Array, prediction: Array) -> Array:
    """The weighted sum of the kept velocities, sample by sample."""
    return np.stack([sum(w * v for w, v in zip(*one, strict=True)) for one in zip(prediction, velocities, strict=True)])


def guide(*, velocity_conditional: Array, velocity_unconditional: Array, guidance: Array) -> Array:
    """Classifier-free guidance, sample by sample."""
    pairs = zip(velocity_conditional, velocity_unconditional, guidance, strict=True)
    return np.stack([without + scale * (with_prompt - without) for with_prompt, without, scale in pairs])


def grow(small: tuple[int, int], *, latent: Array, noise: Array, timestep: Array, gain: Array) -> Array:
    """The larger latents, sample by sample, of small ones (h, w) that lie in the low corner of ``latent``."""
    h, w = small
    rows = []
    for i in range(len(latent)):
        coefficients = timestep[i] * noise[i]
        coefficients[..., :h, :w] = dctn(latent[i, ..., :h, :w], type=2, norm="ortho", axes=(-2, -1))
        rows.append(gain[i] * idctn(coefficients, type=2, norm="ortho", axes=(-2, -1)))
    return np.stack(rows)


def patches(values: Array, p: int) -> Array:
    """The values of every patch, side by side: (C, …, H, W) → (C, …, H/p, W/p, p·p)."""
    windows = np.lib.stride_tricks.sliding_window_view(values, (p, p), axis=(-2, -1))[..., ::p, ::p, :, :]
    return windows.reshape(*windows.shape[:-2], p * p)
