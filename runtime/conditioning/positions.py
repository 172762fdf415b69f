"""Rotary position tables of a level: inputs of its graph, made once per level and size.

A coarse patch sits at the centre of the native patches that it covers, so its coordinate is given in native-patch
units: ``(i + 1/2) r - 1/2`` with ``r = patch / native patch``. At the native level this is the plain index.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ddit.runtime import shapes
from ddit.runtime.bundle.manifest import LatentInfo, RotaryInfo
from ddit.runtime.bundle.names import TABLES

FloatArray = NDArray[np.float32]


def patch_centres(count: int, ratio: float) -> NDArray[np.float64]:
    """Coordinates of ``count`` patches in native-patch units, ``ratio`` native patches wide each."""
    return (np.arange(count, dtype=np.float64) + 0.5) * ratio - 0.5


def rotary_tables(positions: RotaryInfo, grid: Mapping[str, int], ratio: float) -> tuple[FloatArray, FloatArray]:
    """Cosine and sine tables, each ``(*grid, rotated dimensions)`` float32, for a grid of patches.

    Angles are made in float64 and every frequency stands twice, side by side, as in diffusers' ``FluxPosEmbed``
    (RoFormer, arXiv 2104.09864, equation 15). An axis without a name has the coordinate 0 everywhere.

    Args:
        positions: the rotated axes, in the order in which they share a head's dimensions.
        grid: patches along each axis of the latent, in the latent's order.
        ratio: the level's patch over the native patch (1 at the native level). Frames are not cut: theirs is 1.
    """
    ratios = {"frames": 1.0}
    centres = np.meshgrid(
        *(patch_centres(count, ratios.get(name, ratio)) for name, count in grid.items()), indexing="ij"
    )
    coordinates: dict[str | None, NDArray[np.float64]] = dict(zip(grid, centres, strict=True))
    coordinates[None] = np.zeros(tuple(grid.values()))
    angles = [
        coordinates[one.axis][..., None]
        * positions.theta ** -(np.arange(0, one.dimensions, 2, dtype=np.float64) / one.dimensions)
        for one in positions.axes
    ]
    angle = np.repeat(np.concatenate(angles, axis=-1), 2, axis=-1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def level_tables(
    positions: RotaryInfo, latent: LatentInfo, native: int, patch: int, sizes: Mapping[str, int]
) -> dict[str, FloatArray]:
    """The tables of a level as inputs of its graph, by name, for a latent of the size that ``sizes`` gives in symbols.

    ``native`` and ``patch`` are the native level's patch and this level's.
    """
    grid = shapes.grid(latent, patch, sizes)
    return dict(zip(TABLES, rotary_tables(positions, grid, patch / native), strict=True))
