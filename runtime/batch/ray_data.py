"""Pictures and clips over a Ray cluster: Ray Data hands lines to processes that keep an engine room each.

The bundle and the folder lie at the same paths on every machine. A process that dies is replaced, and its lines go to
others: a picture is the same from the same seed, and takes the place of its like.
"""

import asyncio
import logging
import math
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddit.runtime.batch.lines import Wanted
from ddit.runtime.batch.make import OnDone, its_own, write
from ddit.runtime.batch.results import Results
from ddit.runtime.cluster import cluster, of_a_process, pool, reason
from ddit.runtime.errors import BackendError, DditError
from ddit.runtime.pipeline import Pipeline, Result
from ddit.runtime.serving.engine_room import EngineRoom
from ddit.runtime.serving.tickets import Closed, Job
from ddit.runtime.serving.worker import Worker

ROWS = 16  # of a task; as many as Ray Data lets run at once in one


def spread(
    wanted: Sequence[Wanted],
    folder: Path,
    bundle: Path,
    *,
    backend: str | None,
    threads: int | None,
    vae_tiling: int | None,
    in_flight: int,
    replicas: tuple[int, int] | None,
    frames_per_second: float | None,
    on_done: OnDone,
) -> None:
    """Make what is wanted, on as many processes as the cluster has GPUs or as ``replicas`` says.

    Raises `DditError` where the processes cannot work. What they have finished is in the folder then.
    """
    with cluster():
        import ray
        from ray.data import ActorPoolStrategy, DataContext
        from ray.exceptions import RayError

        least, most = pool(backend, replicas)
        for handler in logging.getLogger("ray.data").handlers:  # its files have everything
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.CRITICAL + 1)
        DataContext.get_current().enable_progress_bars = False
        by_id = {one.id: one for one in wanted}
        # a time budget is meant for a picture that is made by itself
        budgeted = [one for one in wanted if one.request.budget is not None]
        for some, at_once in ([one for one in wanted if one.request.budget is None], in_flight), (budgeted, 1):
            if not some:
                continue
            rows = min(ROWS, math.ceil(len(some) / most))
            tasks = math.ceil(2 * at_once / rows)
            blocks = math.ceil(len(some) / rows)
            actors = ActorPoolStrategy(
                min_size=min(least, blocks),
                max_size=min(most, blocks),
                max_concurrent_calls_per_actor=tasks,
                max_tasks_in_flight_per_actor=tasks,
            )
            place = str(folder.resolve())
            arguments = (str(bundle.resolve()), backend, threads, vae_tiling, at_once, place, frames_per_second)
            lines = ray.data.from_items([{"wanted": one.to_json()} for one in some], override_num_blocks=blocks)
            try:
                for row in lines.map(
                    Maker, fn_constructor_args=arguments, compute=actors, **of_a_process(backend)
                ).iter_rows():
                    on_done(by_id[row["id"]], DditError(row["error"]) if row["error"] else None)
            except RayError as error:
                raise BackendError(f"a process failed: {reason(str(error))}") from None


class Maker:
    """A process with the model."""

    def __init__(
        self,
        bundle: str,
        backend: str | None,
        threads: int | None,
        vae_tiling: int | None,
        in_flight: int,
        folder: str,
        frames_per_second: float | None,
    ):
        pipeline = Pipeline.open(bundle, backend=backend, threads=threads, vae_tiling=vae_tiling)
        self._folder, self._frames_per_second = Path(folder), frames_per_second
        self._worker = Worker(EngineRoom(pipeline, in_flight=in_flight, waiting=in_flight))
        self._places = asyncio.Semaphore(1 if in_flight == 1 else 2 * in_flight)
        self._results = Results(self._folder, f"{socket.gethostname()}-{os.getpid()}")
        self._worker.start()

    async def __call__(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Make a line's picture. Raises `BackendError` where nothing can be made any more."""
        one = Wanted.from_json(str(row["wanted"]))
        async with self._places:
            outcome = await self._make(one)
        error = await asyncio.to_thread(write, one, outcome, self._folder, self._results, self._frames_per_second)
        return {"id": one.id, "error": str(error or "")}

    async def _make(self, one: Wanted) -> Result | DditError:
        room = self._worker.room
        try:
            run = await asyncio.to_thread(room.resolve, one.request)
            if run.budget is not None:
                await asyncio.to_thread(room.pipeline.costs, run.size)
        except DditError as error:
            return its_own(error)
        async with self._worker.order([Job(run)]) as order:
            async for _, event in order:
                if isinstance(event, Closed):
                    if event.error is not None:
                        return its_own(event.error)
                    assert event.result is not None
                    return event.result
        raise BackendError("the engine room closed without an end")  # which it never does
