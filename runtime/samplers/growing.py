"""Growing a latent: what the grow graph takes (Spectral Progressive Diffusion, arXiv 2605.18736, equations 5 and 6).

At noise level t a small latent becomes a larger one of the same picture. In the orthonormal DCT-II its coefficients are
the larger latent's lowest frequencies; all higher ones are noise of that level, t·N(0, 1). The coefficients of noise
keep their size from one resolution to another, those of a picture grow with r, the root of the ratio of the areas.
κ = r / (1 + (r − 1)·t) makes up for that: times κ the result is a latent at the noise level t̃ = κ·t.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ddit.runtime.bundle.names import GROWING_TABLES
from ddit.runtime.samplers.sigmas import noise

FloatArray = NDArray[np.float32]


def dct_matrix(size: int) -> NDArray[np.float64]:
    """The orthonormal DCT-II as a matrix (size, size), a frequency a row: ``dct_matrix(n) @ x`` is the transform of x.

    >>> dct_matrix(2).round(3).tolist()
    [[0.707, 0.707], [0.707, -0.707]]
    """
    frequencies, places = np.arange(size)[:, None], np.arange(size) + 0.5
    matrix: NDArray[np.float64] = np.sqrt(2 / size) * np.cos(np.pi / size * frequencies * places)
    matrix[0] /= np.sqrt(2)
    return matrix


@lru_cache(maxsize=8)
def growing_tables(small: tuple[int, int], full: tuple[int, int]) -> Mapping[str, FloatArray]:
    """The grow graph's tables by name, for a latent that grows from one height and width to another.

    Everything has the larger size, so that the graph knows no other: the small latent lies in its array's low corner
    (rows and columns from 0 on), and its DCT matrices lie in the low corners of theirs, with zeros around them.
    """
    low = [np.pad(dct_matrix(few), (0, many - few)) for few, many in zip(small, full, strict=True)]
    fresh = np.ones(full)
    fresh[: small[0], : small[1]] = 0
    tables = (*low, *map(dct_matrix, full), fresh)
    return dict(zip(GROWING_TABLES, (table.astype(np.float32) for table in tables), strict=True))


def noise_coefficients(seed: int, shape: tuple[int, ...]) -> FloatArray:
    """The orthonormal DCT-II of a seed's starting noise (C, H, W), standard normal too; of a clip, frame by frame.

    All sizes of a run take theirs from these of the full size, so that a seed shows the picture that it shows without
    growing: a small latent starts as the lowest ones, and what it gets when it grows are the next ones.
    """
    height, width = shape[-2:]
    coefficients: NDArray[np.float64] = dct_matrix(height) @ noise(seed, shape) @ dct_matrix(width).T
    return coefficients.astype(np.float32)


def small_noise(coefficients: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """The noise of a smaller shape (C, h, w) that has the lowest of the coefficients."""
    height, width = shape[-2:]
    small: NDArray[np.float64] = dct_matrix(height).T @ coefficients[..., :height, :width] @ dct_matrix(width)
    return small.astype(np.float32)


def in_corner(latent: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """A small latent (C, h, w) in the low corner of zeros of a larger shape (C, H, W)."""
    return np.pad(latent, [(0, many - few) for few, many in zip(latent.shape, shape, strict=True)])
