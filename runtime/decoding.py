"""Latents to what one sees: a picture, or the frames of a clip."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import closing
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddit.runtime import tiling
from ddit.runtime.backends.base import Backend, FloatArray
from ddit.runtime.bundle.manifest import DecoderInfo, VideoDecoderInfo
from ddit.runtime.bundle.names import FRAMES, IMAGE, LATENT, LATENT_FRAME
from ddit.runtime.errors import NotFiniteError, UsageError, not_finite
from ddit.runtime.step import Call, Program, call, renamed
from ddit.runtime.tiling import Tiling

FIRST = "first_frame"  # a buffer
LATEST_SIZES = 64  # whose tiles are remembered

Frames = tuple[Image.Image, ...]  # of a picture one
OnFrame = Callable[[int, int], None]  # told how many of all latent frames are decoded, each once for every tile


class Decoder(ABC):
    """Turns latents into pictures or clips."""

    _together: bool  # whether all latents of a batch are decoded by the same calls

    def __init__(self, backend: Backend, info: DecoderInfo | VideoDecoderInfo, tile: int | None):
        """``tile``: the side in pixels of tiles for what is larger (`ddit.runtime.tiling`); None: all is decoded whole.

        Raises `UsageError` for a side that the latent cannot be cut into.
        """
        self._backend, self._graphs = backend, info.graphs
        self._latent = backend.bundle.manifest.latent
        self._tile = tiling.check_side(self._latent, tile)
        self._known_tilings = lru_cache(maxsize=LATEST_SIZES)(self._find_tiling)

    def __call__(self, latents: FloatArray, on_frame: OnFrame | None = None) -> list[Frames]:
        """The frames of latents (B, C, …, H, W). Raises `BackendError` when an engine fails."""
        made: list[Frames] = []
        calls = [latents] if self._together else [latents[number : number + 1] for number in range(len(latents))]
        height, width = latents.shape[-2:]
        tiles = self.tiling(height, width, len(latents))
        down, right = tiles.downscale
        done, total = 0, len(calls) * len(tiles) * (latents.shape[2] if self._latent.has_frames else 1)
        for some in calls:
            clips: list[list[NDArray[np.uint8]]] = [[] for _ in some]  # of every latent frame its frames
            with closing(tiles.decode(some, self._decode)) as pieces:
                for number, rows, columns, values in pieces:
                    for clip, piece in zip(clips, values, strict=True):
                        if number == len(clip):
                            clip.append(np.empty((piece.shape[1], height * down, width * right, 3), np.uint8))
                        clip[number][:, rows, columns] = to_pixels(piece)
                    done += 1
                    if on_frame:
                        on_frame(done, total)
            made += [_images(clip) for clip in clips]
        return made

    def tiling(self, height: int, width: int, batch: int) -> Tiling:
        """The tiles of ``batch`` latents of a size in latent pixels; one where they are decoded whole.

        Tiles are cut as diffusers does. Where the backend's engines do not hold the short ones at the edges, all are
        whole. Raises `UsageError` where they hold no tile.
        """
        return self._known_tilings(height, width, batch if self._together else 1)

    def _find_tiling(self, height: int, width: int, batch: int) -> Tiling:
        ways = () if self._tile is None else tiling.tilings(self._latent, height, width, self._tile)
        reason: UsageError | None = None
        for way in ways:
            try:
                for size in way.sizes():
                    self._backend.check({**size, "batch": batch}, self._graphs)
            except UsageError as error:
                reason = error
            else:
                return way
        if reason:
            raise UsageError(f"the VAE cannot decode tiles of {self._tile} pixels here: {reason}; or take other tiles")
        return tiling.whole(self._latent, height, width)

    @abstractmethod
    def _decode(self, latents: FloatArray) -> Generator[FloatArray, None, None]:
        """Frames (B, 3, frames, height, width) of one latent frame after the other, in arrays that may be changed."""


def make_decoder(backend: Backend, tile: int | None = None) -> Decoder:
    """The decoder of a backend's bundle; ``tile`` as `Decoder` takes it."""
    info = backend.bundle.manifest.decoder
    return PictureDecoder(backend, info, tile) if isinstance(info, DecoderInfo) else ClipDecoder(backend, info, tile)


class PictureDecoder(Decoder):
    """One call of one graph for every picture, or for every tile of one.

    Not one for all: a call takes memory for every picture in it, and cuDNN looks for its convolutions' kernels anew
    when a batch is of another size than the last one, which takes longer than a picture does.
    """

    _together = False

    def _decode(self, latents: FloatArray) -> Generator[FloatArray, None, None]:
        (graph,) = self._graphs
        picture = self._backend.engine(graph).run({LATENT: np.ascontiguousarray(latents)})[IMAGE]
        _check(self._backend, graph, picture)
        yield picture[:, :, None]


class ClipDecoder(Decoder):
    """One latent frame a call. What later frames need of earlier ones stays where the backend computes.

    So the memory that a clip needs does not grow with its length.
    """

    _together = True

    def __init__(self, backend: Backend, info: VideoDecoderInfo, tile: int | None):
        super().__init__(backend, info, tile)
        manifest = backend.bundle.manifest
        first, following = (manifest.graphs[graph] for graph in info.graphs)
        # the first call gives fewer frames than the others, so they go to another buffer
        self._buffers = {spec.name: spec for spec in (*following.inputs, *following.outputs)}
        (frames,) = (spec for spec in first.outputs if spec.name == FRAMES)
        self._buffers[FIRST] = frames
        self._first = _program(renamed(call(manifest, info.first), outputs={FRAMES: FIRST}))
        self._following = _program(call(manifest, info.following))

    def _decode(self, latents: FloatArray) -> Generator[FloatArray, None, None]:
        count, _, length, height, width = latents.shape
        workspace = self._backend.workspace(self._buffers, {"B": count, "H": height, "W": width})
        try:
            for number in range(length):
                program, frames = (self._following, FRAMES) if number else (self._first, FIRST)
                some = workspace.run(program, {LATENT_FRAME: latents[:, :, number : number + 1]})[frames]
                _check(self._backend, program.name, some)
                yield some
        finally:
            self._backend.give_back(workspace)


def _images(chunks: list[NDArray[np.uint8]]) -> Frames:
    """The frames of all chunks, which are let go of one after the other: a picture is a copy."""
    images: list[Image.Image] = []
    while chunks:
        images += map(Image.fromarray, chunks.pop(0))
    return tuple(images)


def _program(one: Call) -> Program:
    return Program(name=one.graph, calls=(one,), tables={}, tokens=0)


def _check(backend: Backend, graph: str, values: FloatArray) -> None:
    if not np.isfinite(values).all():
        raise NotFiniteError(not_finite(graph, "the end", backend.bundle.manifest.graphs[graph].dtype))


def to_pixels(frames: FloatArray) -> NDArray[np.uint8]:
    """Pixels (frames, height, width, 3) of ``(3, frames, height, width)`` in [-1, 1]."""
    pixels = np.round((np.clip(frames, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    return pixels.transpose(1, 2, 3, 0)
