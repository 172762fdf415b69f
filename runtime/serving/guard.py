"""What stands before the application: a token, limits on the body, an access log without prompts."""

import asyncio
import hmac
import logging
import secrets
from collections.abc import Callable
from time import perf_counter

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddit.runtime.console import printable
from ddit.runtime.serving.schema import ErrorBody, ErrorResponse

access = logging.getLogger("ddit.access")

OPEN = ("/", "/healthz", "/readyz")  # need no token
OPEN_BELOW = "/page/"

INVALID = "invalid_request_error"
LONGEST_PATH = 200  # characters of one in the log

INVALID = "invalid_request_error"
LONGEST_PATH = 200  # characters of one in the log

OnResponse = Callable[[str, str, int], None]  # method, path and status


def error_response(
    status: int, message: str, kind: str, *, code: str | None = None, param: str | None = None, **headers: str
) -> JSONResponse:
    """An error in OpenAI's shape."""
    body = ErrorResponse(error=ErrorBody(message=message, type=kind, param=param, code=code))
    return JSONResponse(body.model_dump(), status, {name.replace("_", "-"): text for name, text in headers.items()})


class TooLargeError(Exception):
    """A body is larger than it may be."""


class ClientGoneError(Exception):
    """The client went before its body had arrived."""


class Guard:
    """An ASGI middleware."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        body: int,
        body_seconds: float,
        on_response: OnResponse = lambda method, path, status: None,
    ):
        self._app, self._token, self._body, self._body_seconds = app, token, body, body_seconds
        self._on_response = on_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request that may pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, status, number = perf_counter(), 0, secrets.token_hex(8)

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", number.encode())]
            await send(message)

        try:
            answer = self._refuse(scope)
            if answer is None:
                try:
                    body = await asyncio.wait_for(self._read(receive), self._body_seconds)
                except TooLargeError:
                    answer = self._too_large()
                except ClientGoneError:
                    return
                except asyncio.TimeoutError:
                    message = "the body took too long to arrive"
                    answer = error_response(408, message, INVALID, code="request_timeout", connection="close")
            if answer is None:
                await self._app(scope, _again(body, receive), noted)
            else:
                await answer(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", None)
            self._on_response(scope["method"] if route else "other", route or "other", status)
            client = scope["client"][0] if scope.get("client") else "-"
            milliseconds = (perf_counter() - begin) * 1000
            path = printable(scope["path"][:LONGEST_PATH])
            access.info("%s %s %s %d %.0f ms %s", client, scope["method"], path, status, milliseconds, number)

    async def _read(self, receive: Receive) -> bytes:
        """The body. Raises `TooLargeError` or `ClientGoneError`."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            body += message.get("body", b"")
            if len(body) > self._body:
                raise TooLargeError
            if not message.get("more_body", False):
                return bytes(body)

    def _refuse(self, scope: Scope) -> JSONResponse | None:
        """The answer to a request that may not pass."""
        headers = dict(scope["headers"])
        if self._token is not None and scope["path"] not in OPEN and not scope["path"].startswith(OPEN_BELOW):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(given.strip(), self._token.encode())
            if scheme.lower() != b"bearer" or not right:
                message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
                return error_response(401, message, INVALID, code="invalid_api_key",
                                      www_authenticate="Bearer")  # fmt: skip
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self._body:
            return self._too_large()
        return None

    def _too_large(self) -> JSONResponse:
        message = f"the body is larger than {self._body} bytes"
        return error_response(413, message, INVALID, code="request_too_large", connection="close")


def _again(body: bytes, receive: Receive) -> Receive:
    """What receives a body that was read already, and after it whatever comes."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
