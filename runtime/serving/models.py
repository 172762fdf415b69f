"""What a server asks for pictures: a model, wherever it is, and the one that this process has."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence

from ddit.runtime.errors import DditError, UsageError
from ddit.runtime.serving.about import describe
from ddit.runtime.serving.pictures import Telling, Told
from ddit.runtime.serving.schema import WEIGHTS, ImageRequest, Limits, ModelInfo
from ddit.runtime.serving.tickets import Closed, Job, State
from ddit.runtime.serving.worker import Worker


class ExpiredError(DditError):
    """A request took longer than it may."""


class UnavailableError(DditError):
    """The model is not ready, or broken."""


class Model(ABC):
    """A model that makes pictures. Belongs to an event loop."""

    @abstractmethod
    async def info(self) -> ModelInfo:
        """Its name and what it can do. Raises `UnavailableError` while nobody can say."""

    @abstractmethod
    def pictures(self, asked: ImageRequest) -> AsyncGenerator[Told, None]:
        """What is to be told of the pictures of a request, from their acceptance on.

        What is not done is given up when the iterator is closed. Raises `UsageError`, `RoomFullError`,
        `UnavailableError`, `ExpiredError` or `BackendError`.
        """

    @property
    @abstractmethod
    def broken(self) -> str | None:
        """Why only a restart of this process can help."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether it takes requests."""

    def start(self) -> None:  # noqa: B027
        """Begin to work."""

    def stop(self) -> None:  # noqa: B027
        """Finish what was accepted."""


class LocalModel(Model):
    """A model over a worker of this process that is not started yet."""

    def __init__(self, worker: Worker, limits: Limits):
        self.worker, self.limits = worker, limits
        pipeline = worker.room.pipeline
        self._manifest = pipeline.bundle.manifest
        self._info = ModelInfo(id=self._manifest.model.id, created=int(time.time()), ddit=describe(pipeline, limits))

    async def info(self) -> ModelInfo:
        """Its name and what it can do."""
        return self._info

    async def pictures(self, asked: ImageRequest) -> AsyncGenerator[Told, None]:
        """What is to be told of the pictures of a request; see `Model`."""
        if not self.ready:
            raise UnavailableError(self.broken or "the server is starting; try later")
        wanted = await asyncio.to_thread(self._jobs, asked)
        telling = Telling(asked, [job.run for job in wanted], self._manifest)
        async with self.worker.order(wanted, steps=bool(asked.progress)) as order:
            for told in telling.accepted():
                yield told
            async for index, event in order:
                if isinstance(event, Closed):
                    _check(event)
                if told_now := await asyncio.to_thread(telling, index, event):
                    yield told_now

    def _jobs(self, asked: ImageRequest) -> Sequence[Job]:
        limits, room = self.limits, self.worker.room
        asked.check(limits)
        frames = 1 if self._manifest.latent.has_frames else None  # a clip of one frame is a picture
        runs = [room.resolve(request) for request in asked.requests(frames)]
        for run in runs:
            if run.steps > limits.steps:
                raise UsageError(f"the schedule has {run.steps} steps; at most {limits.steps} are taken")
            if limits.pixels is not None and run.size.height * run.size.width > limits.pixels:
                raise UsageError(f"a picture of {run.size} has more than the {limits.pixels} pixels that are taken")
        deadline = room.clock() + limits.patience(asked)
        weight = WEIGHTS[asked.priority or "normal"]
        return [Job(run, deadline, weight, asked.partial_images or 0, bool(asked.progress)) for run in runs]

    @property
    def broken(self) -> str | None:
        """Why nothing can be made any more."""
        return self.worker.broken

    @property
    def ready(self) -> bool:
        """Whether it has warmed up and works."""
        return self.worker.ready.is_set() and not self.worker.broken

    def start(self) -> None:
        """Start the worker."""
        self.worker.start()

    def stop(self) -> None:
        """Finish what was accepted, then end the worker."""
        self.worker.stop()


def _check(event: Closed) -> None:
    """Raise `DditError` for the end of a job that made no picture."""
    if event.error:
        raise event.error
    if event.ticket.state is State.EXPIRED:
        raise ExpiredError("the picture took longer than the request's timeout")
