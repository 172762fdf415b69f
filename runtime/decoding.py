"""Latents to what one sees: a picture, or the frames of a clip."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from PIL import Image

from ddit.runtime.backends.base import Backend, FloatArray
from ddit.runtime.bundle.manifest import DecoderInfo, VideoDecoderInfo
from ddit.runtime.bundle.names import FRAMES, IMAGE, LATENT, LATENT_FRAME
from ddit.runtime.errors import NotFiniteError, not_finite
from ddit.runtime.step import Call, Program, call, renamed

FIRST = "first_frame"  # a buffer

Frames = tuple[Image.Image, ...]  # of a picture one
OnFrame = Callable[[int, int], None]  # told how many of all latent frames are decoded


class Decoder(ABC):
    """Turns latents into pictures or clips."""

    @abstractmethod
    def __call__(self, latents: FloatArray, on_frame: OnFrame | None = None) -> list[Frames]:
        """The frames of latents (B, C, …, H, W). Raises `BackendError` when an engine fails."""


def make_decoder(backend: Backend) -> Decoder:
    """The decoder of a backend's bundle."""
    info = backend.bundle.manifest.decoder
    return PictureDecoder(backend, info) if isinstance(info, DecoderInfo) else ClipDecoder(backend, info)


class PictureDecoder(Decoder):
    """One call of one graph for every picture.

    Not one for all: a call takes memory for every picture in it, and cuDNN looks for its convolutions' kernels anew
    when a batch is of another size than the last one, which takes longer than a picture does.
    """

    def __init__(self, backend: Backend, info: DecoderInfo):
        self._backend, self._graph = backend, info.graph

    def __call__(self, latents: FloatArray, on_frame: OnFrame | None = None) -> list[Frames]:
        """Pictures of latents (B, C, H, W)."""
        engine = self._backend.engine(self._graph)
        pictures: list[Frames] = []
        for number in range(len(latents)):
            (picture,) = engine.run({LATENT: latents[number : number + 1]})[IMAGE]
            _check(self._backend, self._graph, picture)
            pictures.append((to_image(picture),))
            if on_frame:
                on_frame(number + 1, len(latents))
        return pictures


class ClipDecoder(Decoder):
    """One latent frame a call. What later frames need of earlier ones stays where the backend computes.

    So the memory that a clip needs does not grow with its length.
    """

    def __init__(self, backend: Backend, info: VideoDecoderInfo):
        self._backend = backend
        manifest = backend.bundle.manifest
        first, following = (manifest.graphs[graph] for graph in info.graphs)
        # the first call gives fewer frames than the others, so they go to another buffer
        self._buffers = {spec.name: spec for spec in (*following.inputs, *following.outputs)}
        (frames,) = (spec for spec in first.outputs if spec.name == FRAMES)
        self._buffers[FIRST] = frames
        self._first = _program(renamed(call(manifest, info.first), outputs={FRAMES: FIRST}))
        self._following = _program(call(manifest, info.following))

    def __call__(self, latents: FloatArray, on_frame: OnFrame | None = None) -> list[Frames]:
        """Clips of latents (B, C, F, H, W)."""
        count, _, length, height, width = latents.shape
        workspace = self._backend.workspace(self._buffers, {"B": count, "H": height, "W": width})
        clips: list[list[Image.Image]] = [[] for _ in range(count)]
        try:
            for number in range(length):
                program, frames = (self._following, FRAMES) if number else (self._first, FIRST)
                some = workspace.run(program, {LATENT_FRAME: latents[:, :, number : number + 1]})[frames]
                _check(self._backend, program.name, some)
                for clip, pictures in zip(clips, some, strict=True):
                    clip += map(to_image, pictures.transpose(1, 0, 2, 3))
                if on_frame:
                    on_frame(number + 1, length)
        finally:
            self._backend.give_back(workspace)
        return [tuple(clip) for clip in clips]


def _program(one: Call) -> Program:
    return Program(name=one.graph, calls=(one,), tables={}, tokens=0)


def _check(backend: Backend, graph: str, values: FloatArray) -> None:
    if not np.isfinite(values).all():
        raise NotFiniteError(not_finite(graph, "the end", backend.bundle.manifest.graphs[graph].dtype))


def to_image(picture: FloatArray) -> Image.Image:
    """A picture from ``(3, height, width)`` in [-1, 1]."""
    pixels = np.round((np.clip(picture, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    return Image.fromarray(pixels.transpose(1, 2, 0))
