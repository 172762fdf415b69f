"""A bundle served by uvicorn until SIGTERM or Ctrl-C; what was accepted is finished first."""

import asyncio
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ddit.runtime.costs import warm_up
from ddit.runtime.errors import BackendError, UsageError
from ddit.runtime.pipeline import Pipeline
from ddit.runtime.serving.app import create_app
from ddit.runtime.serving.engine_room import EngineRoom
from ddit.runtime.serving.metrics import Metrics
from ddit.runtime.serving.schema import Limits
from ddit.runtime.serving.worker import Worker

HEAD_SECONDS = 10.0  # for a request's head to arrive
UNREAD_SECONDS = 120  # for a client to read what was sent to it
FIRST_PROMPT = "a red circle, a blue square and a green star on a yellow background"  # colours for previews
SWITCH_SECONDS = 0.0005  # that the thread of the engines waits for Python's other threads at most, between two calls
BACKLOG = 2048  # connections that the kernel keeps until we take them


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that does not wait for the head of a request for ever, which uvicorn would."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has connected."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Some of a request has arrived."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `UsageError` where there can be none."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, UnicodeError, TypeError) as error:  # a host that cannot be encoded is a TypeError
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen at {host}, port {port}: {reason}; choose another --host or --port") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: the kernel drops clients that do not read
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
    return listening


def warmed_up(room: EngineRoom) -> None:
    """Run every level once, and make a picture of the usual size; previews have their first colours from it."""
    warm_up(room.pipeline, room.pipeline.bundle.manifest.size())
    result = room.pipeline(FIRST_PROMPT)
    room.colours.learn(result.latent, result.image)


def make_worker(pipeline: Pipeline, metrics: Metrics, *, in_flight: int, waiting: int) -> Worker:
    """The worker of a pipeline, which warms up before it is ready."""
    room = EngineRoom(pipeline, in_flight=in_flight, waiting=waiting)
    return Worker(room, warm_up=lambda: warmed_up(room), on_turn=metrics.observe)


def serve(
    pipeline: Pipeline,
    listening: socket.socket,
    *,
    limits: Limits,
    in_flight: int,
    waiting: int,
    token: str | None = None,
    drain: float,
) -> None:
    """Serve until a signal. ``drain``: seconds for what was accepted to be finished then.

    Raises `BackendError` where the engines have failed for good.
    """
    metrics = Metrics(pipeline.bundle.manifest)
    worker = make_worker(pipeline, metrics, in_flight=in_flight, waiting=waiting)
    config = uvicorn.Config(
        create_app(worker, metrics, limits=limits, token=token),
        http=PatientProtocol,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=int(drain),
    )
    server = uvicorn.Server(config)
    worker.on_break = lambda: setattr(server, "should_exit", True)
    sys.setswitchinterval(SWITCH_SECONDS)
    with without_prompts():
        server.run(sockets=[listening])
    if worker.broken:
        raise BackendError(worker.broken)


@contextmanager
def without_prompts() -> Iterator[None]:
    """Keep prompts out of the log: a warning says which part of one was too long."""
    log = logging.getLogger("ddit.runtime.conditioning.text")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
