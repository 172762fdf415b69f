"""Rotary position tables of a level: inputs of its graph, made once per size.

A coarse patch sits at the centre of the native patches that it covers, so its coordinate is given in native-patch
units: ``(i + 1/2) r - 1/2`` with ``r = patch / native patch``. At the native level this is the plain index.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


def patch_centres(count: int, ratio: float) -> NDArray[np.float64]:
    """Coordinates of ``count`` patches in native-patch units, ``ratio`` native patches wide each."""
    return (np.arange(count, dtype=np.float64) + 0.5) * ratio - 0.5


def rotary_tables(
    height: int, width: int, ratio: float, axes_dims: Sequence[int], theta: float = 10000.0
) -> tuple[FloatArray, FloatArray]:
    """Cosine and sine tables, each ``(height, width, sum(axes_dims))`` float32, for a grid of patches.

    FLUX.1 rotates three axes: one that is always 0 for pictures, the row and the column. Angles are made in float64
    and every frequency stands twice, side by side, as in diffusers' ``FluxPosEmbed`` (RoFormer, arXiv 2104.09864,
    equation 15).

    Args:
        height, width: patches along each side.
        ratio: the level's patch over the native patch (1 at the native level).
        axes_dims: rotated dimensions of the zero axis, the row and the column; each even.
        theta: base of the frequencies.
    """
    rows, columns = np.meshgrid(patch_centres(height, ratio), patch_centres(width, ratio), indexing="ij")
    angles = [
        position[..., None] * theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
        for position, dim in zip((np.zeros_like(rows), rows, columns), axes_dims, strict=True)
    ]
    angle = np.repeat(np.concatenate(angles, axis=-1), 2, axis=-1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
