"""The HTTP server: OpenAI's image API over an engine room."""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ddit.runtime import strict_json
from ddit.runtime.errors import DditError, UsageError
from ddit.runtime.serving.clips import add_clips
from ddit.runtime.serving.guard import INVALID, Guard, error_response
from ddit.runtime.serving.metrics import Figures, Metrics
from ddit.runtime.serving.models import ExpiredError, LocalModel, Model, UnavailableError
from ddit.runtime.serving.pictures import ACCEPTED, COMPLETED, Told, response, sse
from ddit.runtime.serving.schema import (
    ErrorResponse,
    Health,
    ImageRequest,
    ImagesResponse,
    Limits,
    ModelInfo,
    ModelList,
)
from ddit.runtime.serving.static import add_page
from ddit.runtime.serving.tickets import RoomFullError
from ddit.runtime.serving.worker import Worker

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


def create_app(worker: Worker, metrics: Metrics, *, limits: Limits | None = None, token: str | None = None) -> FastAPI:
    """The application over a worker that is not started yet."""
    limits = limits or Limits()
    app = application([LocalModel(worker, limits)], metrics, limits=limits, token=token)
    if worker.room.pipeline.bundle.manifest.latent.has_frames:
        add_clips(app, worker, limits)
    return app


def application(models: Sequence[Model], figures: Figures, *, limits: Limits, token: str | None) -> FastAPI:
    """The application over models, the first of which serves requests that name none."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for model in models:
            model.start()
        yield
        for model in models:
            await asyncio.to_thread(model.stop)

    app = FastAPI(
        title="ddit", version="1", summary="Pictures from a bundle.", lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.add_middleware(
        Guard,
        token=token,
        body=limits.body,
        body_seconds=limits.body_seconds,
        on_response=lambda method, path, status: figures.responses.labels(method, path, str(status)).inc(),
    )
    app.openapi = lambda: _description(app)  # type: ignore[method-assign]
    _errors(app)
    _pictures(app, models)
    _about(app, models, figures)
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
    if isinstance(error, UnavailableError):
        return error_response(503, text, SERVER, retry_after="5")
    return error_response(500, text, SERVER)


async def _choose(models: Sequence[Model], name: str | None) -> Model:
    """The model of a name. Raises `UsageError` where there is none."""
    if name is None:
        return models[0]
    known = [(await model.info()).id for model in models]
    if name not in known:
        raise UsageError(f"there is no model {name!r} here; this server has {', '.join(map(repr, known))}")
    return models[known.index(name)]


def _pictures(app: FastAPI, models: Sequence[Model]) -> None:
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
        model = await _choose(models, asked.model)
        pictures = model.pictures(asked)
        first = await anext(pictures)  # from here on they are accepted
        if asked.stream:
            return EventStream(first, pictures, progress=bool(asked.progress))
        return await _whole(pictures, request)


async def _whole(pictures: AsyncGenerator[Told, None], request: Request) -> Response:
    """All pictures in one response; nothing more is done for a client that has gone."""
    making, leaving = asyncio.ensure_future(_all_completed(pictures)), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((making, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not making.done():
            return Response(status_code=GONE)  # which nobody reads
        body = response(making.result())
    finally:
        await _end(making, leaving)
    return Response(body.model_dump_json(exclude_none=True), media_type="application/json")


async def _all_completed(pictures: AsyncGenerator[Told, None]) -> dict[int, Told]:
    """What is told of the pictures' ends, by number. Raises `DditError` for one that was not made."""
    async with aclosing(pictures):
        return {told.index: told async for told in pictures if told.kind == COMPLETED}


async def _gone(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what is not done, and wait for its end."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


class EventStream(StreamingResponse):
    """What is told of pictures, as it comes. What is left of them is given up when the client goes."""

    def __init__(self, first: Told, pictures: AsyncGenerator[Told, None], *, progress: bool):
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(self._texts(first, pictures, progress), headers=headers, media_type="text/event-stream")
        self._pictures = pictures
        self._next: asyncio.Future[Told] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them. The pictures are left here, because a stream that nobody has begun to read has no end."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._next is not None:
                await _end(self._next)
            await self._pictures.aclose()

    async def _texts(self, told: Told, pictures: AsyncGenerator[Told, None], progress: bool) -> AsyncIterator[str]:
        try:
            while True:
                if progress or told.kind != ACCEPTED:
                    yield told.text()
                self._next = asyncio.ensure_future(anext(pictures))
                while not (await asyncio.wait((self._next,), timeout=SILENCE))[0]:
                    yield ": waiting\n\n"
                told = self._next.result()
        except StopAsyncIteration:
            return
        except DditError as error:
            yield sse("error", {"type": "error", **strict_json.parse(bytes(_answer(error).body).decode())})


def _about(app: FastAPI, models: Sequence[Model], figures: Figures) -> None:
    """What the server says of itself."""

    @app.get("/v1/models", responses=_documented(401, 503))
    async def all_models() -> ModelList:
        """The models, with what they can do."""
        return ModelList(data=[await model.info() for model in models])

    @app.get("/v1/models/{model:path}", responses=_documented(401, 404, 503))
    async def one_model(model: str) -> ModelInfo:
        """One model."""
        known = {info.id: info for info in [await one.info() for one in models]}
        if model not in known:
            here = ", ".join(map(repr, known))
            raise HTTPException(404, f"there is no model {model!r} here; this server has {here}")
        return known[model]

    @app.get("/healthz", responses={503: {"model": Health}})
    async def alive() -> JSONResponse:
        """Whether the server lives: 503 where only a restart can help."""
        broken = next((model.broken for model in models if model.broken), None)
        return JSONResponse({"status": broken or "ok"}, 503 if broken else 200)

    @app.get("/readyz", responses={503: {"model": Health}})
    async def ready() -> JSONResponse:
        """Whether it takes requests."""
        broken = next((model.broken for model in models if model.broken), None)
        status = broken or ("ok" if all(model.ready for model in models) else "starting")
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics", responses=_documented(401), response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(await figures.text(), media_type=CONTENT_TYPE_LATEST)
