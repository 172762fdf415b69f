"""The spectrum of a model's latents: the power law A·ω^−β that progressive schedules need, from pictures of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ddit.runtime.backends.base import FloatArray
from ddit.runtime.bundle.manifest import SpectrumInfo
from ddit.runtime.errors import UsageError
from ddit.runtime.samplers.growing import dct_matrix

FEWEST_BANDS = 4  # a line through fewer points says nothing


@dataclass(frozen=True)
class Measured:
    """The mean power of latents in bands of frequency, and the power law through it."""

    frequencies: tuple[float, ...]  # ω: the bands' middles, in periods along the shorter side
    powers: tuple[float, ...]  # mean square of a coefficient of the orthonormal DCT-II
    spectrum: SpectrumInfo


def measure(latents: Sequence[FloatArray]) -> Measured:
    """The spectrum of clean latents (C, H, W) of one size, or of clips' (C, F, H, W), frame by frame.

    A DCT-II coefficient (i, j) has i/2 periods along the height and j/2 along the width; ω is √((i/H)² + (j/W)²)·s/2
    for the shorter side s. Bands are one period wide, from ω = ½ to (s − 1)/2. The power law is the line through
    the logarithms that has the least squares, every band counted by its coefficients: few lie in the lowest ones.
    """
    height, width = latents[0].shape[-2:]
    rows, columns = dct_matrix(height), dct_matrix(width)
    planes = np.concatenate([latent.reshape(-1, height, width) for latent in latents])
    power = np.square(rows @ planes @ columns.T).mean(axis=0)
    shorter = min(height, width)
    radius = np.hypot(np.arange(height)[:, None] / height, np.arange(width) / width) * shorter / 2
    bands = np.rint(radius).astype(int)
    frequencies = np.arange(1, shorter // 2)
    if len(frequencies) < FEWEST_BANDS:
        raise UsageError(f"a latent of {height}×{width} is too small to have a spectrum; measure larger pictures")
    powers = np.array([power[bands == one].mean() for one in frequencies])
    counts = np.array([np.count_nonzero(bands == one) for one in frequencies])
    slope, logarithm = np.polyfit(np.log(frequencies), np.log(powers), 1, w=np.sqrt(counts))
    spectrum = SpectrumInfo(amplitude=float(np.exp(logarithm)), exponent=max(0.0, float(-slope)))
    return Measured(tuple(map(float, frequencies)), tuple(map(float, powers)), spectrum)
