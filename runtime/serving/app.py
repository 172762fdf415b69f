"""The HTTP server: OpenAI's image API over an engine room."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ddit.runtime import strict_json
from ddit.runtime.bundle import Manifest
from ddit.runtime.errors import DditError, UsageError
from ddit.runtime.serving.about import describe
from ddit.runtime.serving.clips import add_clips
from ddit.runtime.serving.guard import INVALID, Guard, error_response
from ddit.runtime.serving.metrics import Metrics
from ddit.runtime.serving.pictures import Stream, image_data, size_text, sse, usage
from ddit.runtime.serving.schema import (
    WEIGHTS,
    ErrorResponse,
    Health,
    ImageRequest,
    ImagesResponse,
    Limits,
    ModelInfo,
    ModelList,
)
from ddit.runtime.serving.static import add_page
from ddit.runtime.serving.tickets import Closed, Job, RoomFullError, State
from ddit.runtime.serving.worker import Order, Worker

log = logging.getLogger(__name__)

GONE = 499  # the status in our own figures of a response to nobody
SILENCE = 15.0  # seconds after which a stream sends a comment, so that proxies keep it open
SERVER = "server_error"
ERRORS = {
    400: "The request cannot be met as asked.",
    401: "The token is missing or wrong.",
    404: "There is nothing here.",
    408: "It took longer than it may.",
    413: "The body is too large.",
    429: "Too much was asked for; Retry-After says when to come again.",
    500: "An engine failed.",
    503: "The server is not ready, or broken.",
}


class ExpiredError(DditError):
    """A request took longer than it may."""


def create_app(worker: Worker, metrics: Metrics, *, limits: Limits | None = None, token: str | None = None) -> FastAPI:
    """The application over a worker that is not started yet."""
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(
        title="ddit", version="1", summary="Pictures from a bundle.", lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.add_middleware(
        Guard,
        token=token,
        body=limits.body,
        body_seconds=limits.body_seconds,
        on_response=lambda method, path, status: metrics.responses.labels(method, path, str(status)).inc(),
    )
    app.openapi = lambda: _description(app)  # type: ignore[method-assign]
    _errors(app)
    _pictures(app, worker, limits)
    if worker.room.pipeline.bundle.manifest.latent.has_frames:
        add_clips(app, worker, limits)
    _about(app, worker, metrics, limits)
    add_page(app)
    return app


def _description(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, without the status that FastAPI adds and `_errors` changes."""
    described = FastAPI.openapi(app)
    for path in described["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        described["components"]["schemas"].pop(name, None)
    return described


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": ERRORS[status], "model": ErrorResponse} for status in statuses}


def _errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or None
        code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
        message = f"{where}: {first['msg']}" if where else first["msg"]
        return error_response(400, message, INVALID, code=code, param=where)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        status = 400 if error.status_code == 422 else error.status_code
        headers = {name.replace("-", "_"): text for name, text in (error.headers or {}).items()}
        return error_response(status, str(error.detail), INVALID, **headers)

    @app.exception_handler(DditError)
    async def ours(request: Request, error: DditError) -> JSONResponse:
        return _answer(error)

    @app.exception_handler(Exception)
    async def other(request: Request, error: Exception) -> JSONResponse:
        return error_response(500, "something went wrong here", SERVER)


def _answer(error: DditError) -> JSONResponse:
    """The response for an error of ours."""
    text = str(error)
    if isinstance(error, UsageError):
        return error_response(400, text, INVALID, code="invalid_value")
    if isinstance(error, RoomFullError):
        wait = str(max(1, math.ceil(error.seconds)))
        return error_response(429, text, "rate_limit_error", code="rate_limit_exceeded", retry_after=wait)
    if isinstance(error, ExpiredError):
        return error_response(408, text, INVALID, code="timeout", x_should_retry="false")
    return error_response(500, text, SERVER)


def _pictures(app: FastAPI, worker: Worker, limits: Limits) -> None:
    manifest = worker.room.pipeline.bundle.manifest

    def jobs(asked: ImageRequest) -> list[Job]:
        asked.check(limits, manifest.model.id)
        frames = 1 if manifest.latent.has_frames else None  # a clip of one frame is a picture
        runs = [worker.room.resolve(request) for request in asked.requests(frames)]
        for run in runs:
            if run.steps > limits.steps:
                raise UsageError(f"the schedule has {run.steps} steps; at most {limits.steps} are taken")
            if limits.pixels is not None and run.size.height * run.size.width > limits.pixels:
                raise UsageError(f"a picture of {run.size} has more than the {limits.pixels} pixels that are taken")
        seconds = min(asked.timeout or limits.seconds, limits.seconds)
        deadline = worker.room.clock() + seconds
        weight = WEIGHTS[asked.priority or "normal"]
        return [Job(run, deadline, weight, asked.partial_images or 0, bool(asked.progress)) for run in runs]

    @app.post(
        "/v1/images/generations",
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        responses={
            200: {"content": {"text/event-stream": {}}},
            **_documented(400, 401, 408, 413, 429, 500, 503),
        },
    )
    async def generate(asked: Annotated[ImageRequest, Body()], request: Request) -> Response:
        """Make pictures."""
        if not worker.ready.is_set() or worker.broken:
            text = worker.broken or "the server is starting; try later"
            return error_response(503, text, SERVER, retry_after="5")
        wanted = await asyncio.to_thread(jobs, asked)
        order = worker.order(wanted)
        if asked.stream:
            return EventStream(order, Stream(asked, [job.run for job in wanted], manifest))
        return await _whole(order, asked, wanted, manifest, request)


async def _whole(
    order: Order, asked: ImageRequest, wanted: Sequence[Job], manifest: Manifest, request: Request
) -> Response:
    """All pictures in one response; nothing more is done for a client that has gone."""
    async with order:
        making, leaving = asyncio.ensure_future(_all_closed(order)), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((making, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not making.done():
                return Response(status_code=GONE)  # which nobody reads
            closed = making.result()
        finally:
            for task in (making, leaving):
                task.cancel()
    data = [await asyncio.to_thread(image_data, closed[index], asked) for index in range(len(wanted))]
    runs = [job.run for job in wanted]
    body = ImagesResponse(
        created=int(time.time()),
        data=data,
        size=size_text(runs[0]),
        output_format=asked.output_format or "png",
        usage=usage(runs, manifest),
    )
    return Response(body.model_dump_json(exclude_none=True), media_type="application/json")


async def _all_closed(order: Order) -> dict[int, Closed]:
    """The jobs' last events by number. Raises `DditError` for a job that made no picture."""
    return {index: _finished(event) async for index, event in order if isinstance(event, Closed)}


async def _gone(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """An order's events as they come. What is left of it is given up when the client goes."""

    def __init__(self, order: Order, stream: Stream):
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(self._texts(order, stream), headers=headers, media_type="text/event-stream")
        self._order = order

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them. The order is left here, because a stream that nobody has begun to read has no end."""
        async with self._order:
            await super().__call__(scope, receive, send)

    async def _texts(self, order: Order, stream: Stream) -> AsyncIterator[str]:
        for text in stream.accepted():
            yield text
        try:
            while not order.done:
                try:
                    index, event = await asyncio.wait_for(order.next(), SILENCE)
                except asyncio.TimeoutError:
                    yield ": waiting\n\n"
                    continue
                if isinstance(event, Closed):
                    _finished(event)
                if text := await asyncio.to_thread(stream, index, event):
                    yield text
        except DditError as error:
            yield sse("error", {"type": "error", **strict_json.parse(bytes(_answer(error).body).decode())})


def _finished(event: Closed) -> Closed:
    """The event, if it is of a picture. Raises `DditError` otherwise."""
    if event.error:
        raise event.error
    if event.ticket.state is State.EXPIRED:
        raise ExpiredError("the picture took longer than the request's timeout")
    return event


def _about(app: FastAPI, worker: Worker, metrics: Metrics, limits: Limits) -> None:
    """What the server says of itself."""
    pipeline = worker.room.pipeline
    manifest = pipeline.bundle.manifest
    info = ModelInfo(id=manifest.model.id, created=int(time.time()), ddit=describe(pipeline, limits))

    @app.get("/v1/models", responses=_documented(401))
    async def models() -> ModelList:
        """The bundle's model, with what it can do."""
        return ModelList(data=[info])

    @app.get("/v1/models/{model:path}", responses=_documented(401, 404))
    async def model(model: str) -> ModelInfo:
        """One model."""
        if model != info.id:
            raise HTTPException(404, f"there is no model {model!r} here; this server has {info.id!r}")
        return info

    @app.get("/healthz", responses={503: {"model": Health}})
    async def alive() -> JSONResponse:
        """Whether the server lives: 503 where only a restart can help."""
        return JSONResponse({"status": worker.broken or "ok"}, 503 if worker.broken else 200)

    @app.get("/readyz", responses={503: {"model": Health}})
    async def ready() -> JSONResponse:
        """Whether it takes requests."""
        status = worker.broken or ("ok" if worker.ready.is_set() else "starting")
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics", responses=_documented(401), response_class=PlainTextResponse)
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)
