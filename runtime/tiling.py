"""Latents decoded in overlapping tiles, so that a large picture takes the memory of a small one.

Tiles and arithmetic are those of diffusers' ``vae.enable_tiling()`` (`AutoencoderKL.tiled_decode`,
`AutoencoderKLWan.tiled_decode`): neighbours overlap by a quarter of a tile, and fade linearly into each other there.
"""

import operator
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from math import lcm

import numpy as np

from ddit.profiles import LARGEST
from ddit.runtime.backends.base import FloatArray
from ddit.runtime.bundle.manifest import LatentInfo
from ddit.runtime.errors import UsageError

OVERLAP = 4  # neighbours share the fourth part of a tile

Decode = Callable[[FloatArray], Generator[FloatArray, None, None]]  # of latents, chunk by chunk of their frames
Piece = tuple[int, slice, slice, FloatArray]  # a chunk's number, rows and columns in pixels, and what lies there


@dataclass(frozen=True)
class Span:
    """A tile along one side of the latent, in latent pixels."""

    begin: int  # of what is decoded; what lies before ``start`` is thrown away
    start: int
    stop: int
    end: int  # where the next tile starts, which this one fades into until ``stop``


def spans(extent: int, tile: int, *, whole: bool = False) -> tuple[Span, ...]:
    """The tiles along a side of ``extent`` latent pixels.

    As in diffusers the last ones are shorter than a tile, unless they shall be ``whole``: then they begin earlier.

    >>> [(one.begin, one.stop) for one in spans(40, 16)]
    [(0, 16), (12, 28), (24, 40), (36, 40)]
    >>> [(one.begin, one.stop) for one in spans(44, 16, whole=True)]
    [(0, 16), (12, 28), (24, 40), (28, 44)]
    """
    overlap = tile // OVERLAP
    last = max(extent - overlap, 1) if whole else extent  # what starts later lies inside the whole tile before
    starts = range(0, last, tile - overlap)
    furthest = max(extent - tile, 0) if whole else extent
    return tuple(
        Span(begin=min(start, furthest), start=start, stop=min(start + tile, extent), end=end)
        for start, end in zip(starts, [*starts[1:], extent], strict=True)
    )


@dataclass(frozen=True)
class Tiling:
    """The tiles of latents of one size."""

    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    downscale: tuple[int, int]  # pixels along one latent pixel, downwards and to the right

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def sizes(self) -> list[dict[str, int]]:
        """The different sizes in which tiles are decoded, in pixels."""
        heights, widths = (
            sorted({(span.stop - span.begin) * scale for span in side}, reverse=True)
            for side, scale in zip((self.rows, self.columns), self.downscale, strict=True)
        )
        return [{"height": height, "width": width} for height in heights for width in widths]

    def decode(self, latents: FloatArray, decode: Decode) -> Generator[Piece, None, None]:
        """Decode latents (B, …, H, W) tile by tile, in rows from the top.

        Yields pieces (B, …, rows, columns) that together are the pictures. Of earlier tiles nothing is kept but what
        later ones blend with. ``decode`` gives arrays that may be changed.
        """
        down, right = self.downscale
        above: dict[Span, list[FloatArray]] = {}  # by column, what the tile's chunks hold below their own part
        for row in self.rows:
            before: list[FloatArray] = []  # the same to the right of the tile before
            for column in self.columns:
                below, after = [], []
                tile = latents[..., row.begin : row.stop, column.begin : column.stop]
                with closing(decode(tile)) as chunks:
                    for number, chunk in enumerate(chunks):
                        values = chunk[..., (row.start - row.begin) * down :, (column.start - column.begin) * right :]
                        if row.start:
                            _blend(above[column][number], values, axis=-2)
                        if column.start:
                            _blend(before[number], values, axis=-1)
                        height, width = (row.end - row.start) * down, (column.end - column.start) * right
                        below.append(values[..., height:, :].copy())
                        after.append(values[..., width:].copy())
                        yield (
                            number,
                            slice(row.start * down, row.end * down),
                            slice(column.start * right, column.end * right),
                            values[..., :height, :width],
                        )
                above[column], before = below, after


def _blend(old: FloatArray, new: FloatArray, axis: int) -> None:
    """Let the beginning of ``new`` fade in where ``old`` fades out, as far as that reaches; in place."""
    length = old.shape[axis]
    rising = np.arange(length) / length
    shape = (length, 1) if axis == -2 else (length,)
    share, rest = (weights.astype(np.float32).reshape(shape) for weights in (rising, 1 - rising))
    part = new[..., :length, :] if axis == -2 else new[..., :length]
    part[...] = old * rest + part * share


def whole(latent: LatentInfo, height: int, width: int) -> Tiling:
    """One tile that is all of a latent of this size."""
    rows, columns = ((Span(0, 0, extent, extent),) for extent in (height, width))
    return Tiling(rows, columns, _downscale(latent))


def tilings(latent: LatentInfo, height: int, width: int, side: int) -> tuple[Tiling, ...]:
    """How a latent of this size may be cut into tiles of ``side`` pixels: as diffusers does, or with whole tiles only.

    Nothing where it is no larger than a tile.
    """
    down, right = _downscale(latent)
    if height * down <= side and width * right <= side:
        return ()
    return tuple(
        Tiling(spans(height, side // down, whole=each), spans(width, side // right, whole=each), (down, right))
        for each in (False, True)
    )


def check_side(latent: LatentInfo, side: int | None) -> int | None:
    """A tile's side in pixels, or None for no tiles.

    Raises `UsageError` for one whose quarter is no whole number of latent pixels.
    """
    if side is None:
        return None
    unit = OVERLAP * lcm(*_downscale(latent))
    try:
        pixels = operator.index(side)
    except TypeError:
        raise UsageError(f"the side of the VAE's tiles must be a whole number of pixels, not {side!r}") from None
    if isinstance(side, bool) or pixels < unit or pixels % unit or pixels > LARGEST:
        below = min(max(pixels // unit, 1), LARGEST // unit) * unit
        near = [below, below + unit] if unit < pixels < LARGEST else [below]
        raise UsageError(
            f"tiles of {pixels} pixels do not fit the VAE: their side is a multiple of {unit}; "
            f"nearest: {' or '.join(map(str, near))}"
        )
    return pixels


def _downscale(latent: LatentInfo) -> tuple[int, int]:
    scales = {axis.name: axis.downscale for axis in latent.sides}
    return scales["height"], scales["width"]
