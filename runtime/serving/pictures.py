"""From a room's events to what a client reads: JSON bodies and server-sent events."""

import base64
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddit.runtime import strict_json
from ddit.runtime.bundle import Manifest
from ddit.runtime.request import Run
from ddit.runtime.serving.schema import ImageData, ImageRequest, InputTokens, Made, Usage
from ddit.runtime.serving.tickets import Closed, Event, PartialImage, Stepped
from ddit.runtime.shapes import image_tokens

COMPRESSION = 90  # quality of JPEG and WebP where none was asked for
MEDIA = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


def encode_picture(image: Image.Image, asked: ImageRequest) -> str:
    """A picture in the format that was asked for, in base64."""
    kind = asked.output_format or "png"
    quality = COMPRESSION if asked.output_compression is None else asked.output_compression
    return _base64(image, MEDIA[kind], {} if kind == "png" else {"quality": quality})


def encode_preview(pixels: NDArray[np.uint8]) -> str:
    """A small preview (H, W, 3) as JPEG, in base64."""
    return _base64(Image.fromarray(pixels), "JPEG", {"quality": 80})


def _base64(image: Image.Image, kind: str, options: Mapping[str, Any]) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return base64.b64encode(file.getvalue()).decode("ascii")


def size_text(run: Run) -> str:
    """WIDTHxHEIGHT, as OpenAI writes sizes."""
    return f"{run.size.width}x{run.size.height}"


def usage(runs: Sequence[Run], manifest: Manifest) -> Usage:
    """Of all pictures of a request."""
    text = sum(run.text_length for run in runs)
    picture = sum(image_tokens(manifest.latent, manifest.native, run.sizes) for run in runs)
    return Usage(
        input_tokens=text,
        input_tokens_details=InputTokens(text_tokens=text),
        output_tokens=picture,
        total_tokens=text + picture,
    )


def made(event: Closed) -> Made:
    """How a finished picture came about."""
    result, ticket = event.result, event.ticket
    assert result is not None
    summary = result.trace.summary()
    return Made(
        seed=result.trace.seed,
        schedule=result.trace.schedule["text"],
        queue_milliseconds=(ticket.started - ticket.arrived) * 1000,
        total_milliseconds=(ticket.closed - ticket.arrived) * 1000,
        **{name: value for name, value in summary.items() if name in Made.model_fields},
    )


def image_data(event: Closed, asked: ImageRequest) -> ImageData:
    """A finished picture."""
    result = event.result
    assert result is not None
    trace = strict_json.parse(result.trace.to_json()) if asked.trace else None
    return ImageData(b64_json=encode_picture(result.image, asked), ddit=made(event), trace=trace)


class Stream:
    """The server-sent events of one request: OpenAI's, and ddit's own where they were asked for."""

    def __init__(self, asked: ImageRequest, runs: Sequence[Run], manifest: Manifest):
        self._asked, self._runs, self._manifest = asked, runs, manifest

    def accepted(self) -> Iterator[str]:
        """What is said of every picture before its turn comes."""
        for index, run in enumerate(self._runs if self._asked.progress else ()):
            values = {"seed": run.seed, "size": size_text(run), "steps": run.steps, "schedule": str(run.policy)}
            yield self._event("ddit.accepted", index, values)

    def __call__(self, index: int, event: Event) -> str:
        """The text of an event; empty where the client did not ask for its kind."""
        if isinstance(event, Stepped):
            return self._event("ddit.progress", index, self._progress(event)) if self._asked.progress else ""
        if isinstance(event, PartialImage):
            values = {"b64_json": encode_picture(event.image, self._asked), "partial_image_index": event.index}
            return self._event("image_generation.partial_image", index, {**values, **self._common(index)})
        if isinstance(event, Closed):
            values = image_data(event, self._asked).model_dump(exclude_none=True)
            own = {"usage": usage([self._runs[index]], self._manifest).model_dump(), **self._common(index)}
            return self._event("image_generation.completed", index, {**values, **own})
        return ""

    def _common(self, index: int) -> dict[str, object]:
        """What OpenAI's clients expect of every picture."""
        return {
            "background": "opaque",
            "created_at": int(time.time()),
            "output_format": self._asked.output_format or "png",
            "quality": "auto",
            "size": size_text(self._runs[index]),
        }

    @staticmethod
    def _progress(event: Stepped) -> dict[str, object]:
        record = event.record
        values: dict[str, object] = {
            "step": record.step + 1,
            "steps": event.ticket.run.steps,
            "level": record.level,
            "scale": record.scale,
            "sigma": record.sigma,
            "milliseconds": record.milliseconds,
            "error": record.error,
            "by": record.by,
        }
        return {**values, "preview": encode_preview(event.preview)} if event.preview is not None else values

    @staticmethod
    def _event(kind: str, index: int, values: Mapping[str, object]) -> str:
        return sse(kind, {"type": kind, "index": index, **values})


def sse(kind: str, values: Mapping[str, object]) -> str:
    """A server-sent event."""
    return f"event: {kind}\ndata: {strict_json.dump(values)}\n\n"
