"""A server on a port of this machine."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2 as httpx
import uvicorn

from ddit.runtime import Pipeline
from ddit.runtime.serving.app import create_app
from ddit.runtime.serving.metrics import Metrics
from ddit.runtime.serving.server import PatientProtocol, listen, make_worker
from ddit.runtime.serving.worker import Worker


@dataclass
class Served:
    url: str
    worker: Worker
    port: int

    def metric(self, line: str) -> float:
        """The value of one of the figures."""
        text = httpx.get(f"{self.url}/metrics").text
        return next((float(one.split()[-1]) for one in text.splitlines() if one.startswith(line + " ")), 0.0)


@contextmanager
def serving(pipeline: Pipeline, *, in_flight: int = 4, waiting: int = 8, **options) -> Iterator[Served]:
    metrics = Metrics(pipeline.bundle.manifest)
    worker = make_worker(pipeline, metrics, in_flight=in_flight, waiting=waiting)
    listening = listen("127.0.0.1", 0)
    config = uvicorn.Config(
        create_app(worker, metrics, **options), http=PatientProtocol, access_log=False, log_config=None
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        assert worker.ready.wait(60)
        port = listening.getsockname()[1]
        yield Served(f"http://127.0.0.1:{port}", worker, port)
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()
    assert worker.open == 0, "nothing may stay open"
    assert worker.room.idle
