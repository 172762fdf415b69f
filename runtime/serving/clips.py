"""Clips over HTTP: OpenAI's videos API. A clip is asked for, looked after, and fetched when it is done.

They are kept in memory, so many bytes and so long; a server that ends forgets them.
"""

import asyncio
import io
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from PIL import Image
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ddit.runtime import strict_json
from ddit.runtime.bundle import Manifest
from ddit.runtime.errors import DditError, UsageError
from ddit.runtime.serving.clip_schema import (
    ClipError,
    ClipFormat,
    ClipMade,
    ClipRequest,
    Status,
    Video,
    VideoDeleted,
    VideoList,
    frames_per_second,
)
from ddit.runtime.serving.pictures import made, size_text
from ddit.runtime.serving.schema import WEIGHTS, ErrorResponse, Limits
from ddit.runtime.serving.tickets import Closed, Job, Started, State, Stepped
from ddit.runtime.serving.worker import Order, Worker
from ddit.runtime.video import check_clip_type, save_clip

log = logging.getLogger(__name__)

KEPT_BYTES = 2**30  # of finished clips
KEPT_SECONDS = 3600.0  # after which a finished one is forgotten
KEPT_CLIPS = 10_000  # failed ones take no bytes
MEDIA: dict[ClipFormat, str] = {"mp4": "video/mp4", "webp": "image/webp", "gif": "image/gif"}
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
REFUSED = {"model": ErrorResponse, "description": "The request cannot be met."}


@dataclass(eq=False)
class Clip:
    """One that was asked for."""

    asked: ClipRequest
    job: Job
    id: str = field(default_factory=lambda: f"video_{secrets.token_hex(12)}")
    status: Status = "queued"
    progress: int = 0  # per cent
    created: float = field(default_factory=time.time)
    completed: float | None = None
    error: ClipError | None = None
    made: ClipMade | None = None
    content: bytes = b""
    thumbnail: bytes = b""  # the first frame as WebP
    task: asyncio.Task[None] | None = None  # that makes it

    @property
    def open(self) -> bool:
        """Whether it is still being made."""
        return self.status in ("queued", "in_progress")

    def end(self, status: Status) -> None:
        """Nothing follows."""
        self.status, self.completed = status, time.time()


class Clips:
    """The clips of a server. Belongs to its event loop."""

    def __init__(
        self, worker: Worker, limits: Limits, *, kept_bytes: int = KEPT_BYTES, kept_seconds: float = KEPT_SECONDS
    ):
        self._worker, self._limits = worker, limits
        self._kept_bytes, self._kept_seconds = kept_bytes, kept_seconds
        self._manifest: Manifest = worker.room.pipeline.bundle.manifest
        self._clips: dict[str, Clip] = {}  # in the order of arrival

    async def create(self, asked: ClipRequest) -> Clip:
        """Take a request. Raises `UsageError` or `RoomFullError`."""
        clip = Clip(asked, await asyncio.to_thread(self._job, asked))
        order = self._worker.order([clip.job])
        clip.task = asyncio.create_task(self._make(clip, order))
        self._clips[clip.id] = clip
        return clip

    def find(self, clip: str) -> Clip:
        """A clip by its id. Raises `HTTPException` where there is none, or none any more."""
        self._forget()
        if clip not in self._clips:
            raise HTTPException(404, f"there is no video {clip!r} here, or none any more")
        return self._clips[clip]

    def all(self) -> Sequence[Clip]:
        """All that are known, the oldest first."""
        self._forget()
        return [*self._clips.values()]

    async def delete(self, clip: Clip) -> None:
        """Forget a clip, and give it up if it is still being made."""
        self._clips.pop(clip.id, None)
        await _cancelled(clip)

    async def close(self) -> None:
        """Give up what is being made: nobody could fetch it from a server that has ended."""
        for clip in self._clips.values():
            await _cancelled(clip)

    def describe(self, clip: Clip) -> Video:
        """A clip as clients read it."""
        run = clip.job.run
        assert run.size.frames is not None
        return Video(
            id=clip.id,
            model=self._manifest.model.id,
            status=clip.status,
            progress=clip.progress,
            created_at=int(clip.created),
            completed_at=None if clip.completed is None else int(clip.completed),
            expires_at=None if clip.completed is None else int(clip.completed + self._kept_seconds),
            size=size_text(run),
            seconds=f"{run.size.frames / frames_per_second(self._manifest):g}",
            prompt=clip.asked.prompt,
            error=clip.error,
            ddit=clip.made,
        )

    def _job(self, asked: ClipRequest) -> Job:
        limits, room = self._limits, self._worker.room
        asked.check(limits)
        if asked.model not in (None, model := self._manifest.model.id):
            raise UsageError(f"there is no model {asked.model!r} here; this server has {model!r}")
        try:
            check_clip_type(Path(f"clip.{asked.output_format or 'mp4'}"))
        except UsageError:
            raise UsageError("this server writes no mp4, which needs PyAV; ask for output_format webp or gif") from None
        run = room.resolve(asked.request(self._manifest))
        if run.steps > limits.steps:
            raise UsageError(f"the schedule has {run.steps} steps; at most {limits.steps} are taken")
        if limits.pixels is not None and run.size.height * run.size.width > limits.pixels:
            raise UsageError(f"frames of {run.size} have more than the {limits.pixels} pixels that are taken")
        deadline = room.clock() + limits.patience(asked)
        return Job(run, deadline, WEIGHTS[asked.priority or "normal"])

    async def _make(self, clip: Clip, order: Order) -> None:
        """Follow a clip to its end."""
        try:
            closed = await _followed(clip, order)
            clip.content, clip.thumbnail = await asyncio.to_thread(self._encode, clip, closed)
            size, report = clip.job.run.size, made(closed).model_dump()
            assert size.frames is not None
            fps = frames_per_second(self._manifest)
            clip.made = ClipMade(**report, frames=size.frames, frames_per_second=fps)
            clip.progress = 100
            clip.end("completed")
            self._forget()
        except DditError as error:
            clip.error = ClipError(code="invalid_request" if isinstance(error, UsageError) else "server_error",
                                   message=str(error))  # fmt: skip
            clip.end("failed")
        except Exception:  # a full disk, for instance: whoever asks shall not wait for ever
            log.exception("a clip failed")
            clip.error = ClipError(code="server_error", message="something went wrong here")
            clip.end("failed")

    def _encode(self, clip: Clip, closed: Closed) -> tuple[bytes, bytes]:
        """The file of a finished clip, and its first frame."""
        assert closed.result is not None
        frames = closed.result.frames
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"clip.{clip.asked.output_format or 'mp4'}"
            save_clip(frames, path, frames_per_second(self._manifest))
            return path.read_bytes(), _webp(frames[0])

    def _forget(self) -> None:
        """Drop ended clips that are too old, and the oldest ones where all take too much."""
        ended = sorted((clip for clip in self._clips.values() if not clip.open), key=lambda clip: clip.completed or 0.0)
        total = sum(len(clip.content) for clip in ended)
        latest = time.time() - self._kept_seconds
        for number, clip in enumerate(ended):
            newest = number == len(ended) - 1  # which stays, however large it is
            if (clip.completed or 0.0) >= latest and (
                newest or (total <= self._kept_bytes and len(ended) - number <= KEPT_CLIPS)
            ):
                return
            del self._clips[clip.id]
            total -= len(clip.content)


async def _followed(clip: Clip, order: Order) -> Closed:
    """The end of a clip's job. Raises `DditError` where there is no clip; it is given up when this is cancelled."""
    async with order:
        async for _, event in order:
            if isinstance(event, Started):
                clip.status = "in_progress"
            elif isinstance(event, Stepped):
                # the decoder's share of the time is not known
                clip.progress = 99 * (event.record.step + 1) // clip.job.run.steps
            elif isinstance(event, Closed):
                closed = event
    if closed.error:
        raise closed.error
    if closed.ticket.state is State.EXPIRED:
        raise DditError("the clip took longer than the request's timeout")
    return closed


async def _cancelled(clip: Clip) -> None:
    """Give up what is being made, and wait until that is so."""
    if clip.task is not None:
        clip.task.cancel()
        with suppress(asyncio.CancelledError):
            await clip.task


def _webp(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "WEBP", quality=90)
    return file.getvalue()


async def _read(request: Request) -> ClipRequest:
    """A request's body, JSON or a form. Raises `RequestValidationError`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind in FORMS:
            async with request.form(max_files=1, max_fields=100) as form:
                return ClipRequest.model_validate(dict(form))
        return ClipRequest.model_validate(strict_json.parse((await request.body()).decode()))
    except ValidationError as error:
        found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
        raise RequestValidationError(found) from None
    except ValueError as error:  # no UTF-8, no JSON
        found = [{"type": "json_invalid", "loc": ("body",), "msg": f"not readable: {error}"}]
        raise RequestValidationError(found) from None


def add_clips(app: FastAPI, worker: Worker, limits: Limits) -> Clips:
    """Serve the clips of a worker's bundle, and give them up before the worker is stopped."""
    clips = Clips(worker, limits)
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with inner(app) as state:
            yield state
            await clips.close()

    app.router.lifespan_context = lifespan
    schema = ClipRequest.model_json_schema()
    body = {"required": True, "content": {kind: {"schema": schema} for kind in ("application/json", FORMS[0])}}
    statuses: dict[int | str, dict[str, Any]] = dict.fromkeys((400, 401, 404, 408, 413, 429, 503), REFUSED)

    def documented(*chosen: int) -> dict[int | str, dict[str, Any]]:
        return {status: statuses[status] for status in chosen}

    @app.post("/v1/videos", openapi_extra={"requestBody": body}, responses=documented(400, 401, 408, 413, 429, 503))
    async def create(request: Request) -> Video:
        """Ask for a clip. It comes back at once, queued."""
        asked = await _read(request)
        if not worker.ready.is_set() or worker.broken:
            raise HTTPException(503, worker.broken or "the server is starting; try later", {"retry-after": "5"})
        return clips.describe(await clips.create(asked))

    @app.get("/v1/videos", responses=documented(400, 401))
    async def listed(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        """All clips that are known, a page of them."""
        known = [*clips.all()]
        if order == "desc":
            known.reverse()
        names = [clip.id for clip in known]
        begin = names.index(after) + 1 if after in names else 0
        page = known[begin : begin + limit]
        return VideoList(
            data=[clips.describe(clip) for clip in page],
            first_id=page[0].id if page else None,
            last_id=page[-1].id if page else None,
            has_more=begin + limit < len(known),
        )

    @app.get("/v1/videos/{video}", responses=documented(401, 404))
    async def one(video: str) -> Video:
        """How far a clip is."""
        return clips.describe(clips.find(video))

    @app.get(
        "/v1/videos/{video}/content",
        response_class=Response,
        responses={200: {"content": {kind: {} for kind in MEDIA.values()}}, **documented(400, 401, 404)},
    )
    async def content(video: str, variant: Literal["video", "thumbnail"] = "video") -> Response:
        """The file of a finished clip, or its first frame."""
        clip = clips.find(video)
        if clip.error:
            raise HTTPException(404, f"there is no clip: {clip.error.message}")
        if clip.open:
            raise UsageError(f"the clip is not done; it is {clip.status.replace('_', ' ')}, at {clip.progress} %")
        if variant == "thumbnail":
            return Response(clip.thumbnail, media_type=MEDIA["webp"])
        return Response(clip.content, media_type=MEDIA[clip.asked.output_format or "mp4"])

    @app.delete("/v1/videos/{video}", responses=documented(401, 404))
    async def delete(video: str) -> VideoDeleted:
        """Forget a clip; one that is being made is given up."""
        clip = clips.find(video)
        await clips.delete(clip)
        return VideoDeleted(id=clip.id)

    return clips
