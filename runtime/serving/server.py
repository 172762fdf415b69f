"""A bundle served by uvicorn until SIGTERM or Ctrl-C; what was accepted is finished first."""

import logging

import uvicorn

from ddit.runtime.costs import warm_up
from ddit.runtime.errors import BackendError
from ddit.runtime.pipeline import Pipeline
from ddit.runtime.serving.app import create_app
from ddit.runtime.serving.engine_room import EngineRoom
from ddit.runtime.serving.metrics import Metrics
from ddit.runtime.serving.schema import Limits
from ddit.runtime.serving.worker import Worker


def make_worker(pipeline: Pipeline, metrics: Metrics, *, in_flight: int, waiting: int) -> Worker:
    """The worker of a pipeline, which makes a picture of the usual size before it is ready."""
    size = pipeline.bundle.manifest.size()
    room = EngineRoom(pipeline, in_flight=in_flight, waiting=waiting)
    return Worker(room, warm_up=lambda: warm_up(pipeline, size), on_turn=metrics.observe)


def serve(
    pipeline: Pipeline,
    *,
    host: str,
    port: int,
    limits: Limits,
    in_flight: int,
    waiting: int,
    token: str | None = None,
    drain: float,
) -> None:
    """Serve until a signal. ``drain``: seconds for what was accepted to be finished then."""
    # it says which part of a prompt was too long
    logging.getLogger("ddit.runtime.conditioning.text").setLevel(logging.ERROR)
    metrics = Metrics(pipeline.bundle.manifest)
    worker = make_worker(pipeline, metrics, in_flight=in_flight, waiting=waiting)
    app = create_app(worker, metrics, limits=limits, token=token)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=int(drain),
    )
    uvicorn.Server(config).run()
    if worker.broken:
        raise BackendError(worker.broken)
