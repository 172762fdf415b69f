"""The engine room's thread: what it takes for broken engines."""

import asyncio

import pytest

from ddit.runtime import Bundle, Request
from ddit.runtime.errors import BackendError
from ddit.runtime.serving.engine_room import EngineRoom
from ddit.runtime.serving.tickets import Closed, Job
from ddit.runtime.serving.worker import FAILURES, Worker
from fake_engines import fake_pipeline


@pytest.fixture
def worker(tiny_bundle):
    """A worker over engines that cost nothing, and what spoils them."""
    pipeline, backend, clock = fake_pipeline(Bundle.open(tiny_bundle))
    made = Worker(EngineRoom(pipeline, clock=clock))
    made.start()
    yield made, backend
    made.stop()


async def order(worker: Worker, count: int) -> list[Closed]:
    """The ends of so many pictures that are made together."""
    request = Request("a star", 1, 2, "native", 64, 64)
    async with worker.order([Job(worker.room.resolve(request)) for _ in range(count)]) as order:
        return [event async for _, event in order if isinstance(event, Closed)]


def failing(graph: str):
    def spoil(name, inputs, outputs):
        if name == graph:
            raise BackendError("no more memory")

    return spoil


def test_a_call_that_fails_for_many_pictures_is_one_failure(worker):
    made, backend = worker
    works, backend.spoil = backend.spoil, failing("vae_decoder")
    assert all(end.error for end in asyncio.run(order(made, FAILURES + 1)))
    assert made.broken is None
    backend.spoil = works
    (end,) = asyncio.run(order(made, 1))
    assert end.result


def test_calls_that_fail_in_a_row_mean_broken_engines(worker):
    made, backend = worker
    backend.spoil = failing("vae_decoder")
    for _ in range(FAILURES):
        assert made.broken is None
        asyncio.run(order(made, 2))
    assert "no more memory" in made.broken
