"""From a room's events to what a client reads: JSON bodies and server-sent events."""

import base64
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddit.runtime import strict_json
from ddit.runtime.bundle import Manifest
from ddit.runtime.request import Run
from ddit.runtime.serving.schema import ImageData, ImageRequest, ImagesResponse, InputTokens, Made, Usage
from ddit.runtime.serving.tickets import Closed, Event, PartialImage, Stepped
from ddit.runtime.shapes import image_tokens

COMPRESSION = 90  # quality of JPEG and WebP where none was asked for
ACCEPTED, PROGRESS = "ddit.accepted", "ddit.progress"
PARTIAL, COMPLETED = "image_generation.partial_image", "image_generation.completed"
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


def usage(run: Run, manifest: Manifest) -> Usage:
    """Of a picture."""
    text, picture = run.text_length, image_tokens(manifest.latent, manifest.native, run.sizes)
    details = InputTokens(text_tokens=text)
    return Usage(input_tokens=text, input_tokens_details=details, output_tokens=picture, total_tokens=text + picture)


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


@dataclass(frozen=True)
class Told:
    """What a client is told of a picture: a server-sent event, before it is text."""

    kind: str  # OpenAI's type, or ddit's own
    index: int  # the picture's number from 0
    values: Mapping[str, Any]

    @property
    def key(self) -> tuple[object, ...]:
        """The same when the same is told again, by whoever makes the picture anew."""
        return self.kind, self.index, self.values.get("step"), self.values.get("partial_image_index")

    def text(self) -> str:
        """The event as it is sent."""
        return sse(self.kind, {"type": self.kind, "index": self.index, **self.values})


class Telling:
    """What is told of a request's pictures: OpenAI's events, and ddit's own where they were asked for."""

    def __init__(self, asked: ImageRequest, runs: Sequence[Run], manifest: Manifest):
        self._asked, self._runs, self._manifest = asked, runs, manifest

    def accepted(self) -> Iterator[Told]:
        """What is said of every picture before its turn comes."""
        for index, run in enumerate(self._runs):
            values = {"seed": run.seed, "size": size_text(run), "steps": run.steps, "schedule": str(run.policy)}
            yield Told(ACCEPTED, index, values)

    def __call__(self, index: int, event: Event) -> Told | None:
        """What an event says; None where the client did not ask for its kind."""
        if isinstance(event, Stepped):
            return Told(PROGRESS, index, self._progress(event)) if self._asked.progress else None
        if isinstance(event, PartialImage):
            values = {"b64_json": encode_picture(event.image, self._asked), "partial_image_index": event.index}
            return Told(PARTIAL, index, {**values, **self._common(index)})
        if isinstance(event, Closed):
            values = image_data(event, self._asked).model_dump(exclude_none=True)
            own = {"usage": usage(self._runs[index], self._manifest).model_dump(), **self._common(index)}
            return Told(COMPLETED, index, {**values, **own})
        return None

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


def response(completed: Mapping[int, Told]) -> ImagesResponse:
    """All pictures in one response, from what was told of their ends."""
    told = [completed[index].values for index in sorted(completed)]
    tokens = [Usage.model_validate(one["usage"]) for one in told]
    text = sum(one.input_tokens for one in tokens)
    return ImagesResponse(
        created=int(time.time()),
        data=[ImageData(b64_json=one["b64_json"], ddit=one["ddit"], trace=one.get("trace")) for one in told],
        size=told[0]["size"],
        output_format=told[0]["output_format"],
        usage=Usage(
            input_tokens=text,
            input_tokens_details=InputTokens(text_tokens=text),
            output_tokens=sum(one.output_tokens for one in tokens),
            total_tokens=sum(one.total_tokens for one in tokens),
        ),
    )


def sse(kind: str, values: Mapping[str, object]) -> str:
    """A server-sent event."""
    return f"event: {kind}\ndata: {strict_json.dump(values)}\n\n"
