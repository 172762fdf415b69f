"""A Ray Serve application with the HTTP API, over the engines of others of the cluster's applications.

Serve's router gives every request to a replica that has room, and queues the rest. Where its work ends, ours begins: a
request that a replica had taken when it died is asked of another one. Its seed is drawn here, so that the pictures are
the same, and what the client was told already is not told again.
"""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from time import monotonic
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from ddit.runtime.errors import BackendError, NotFiniteError
from ddit.runtime.serving.app import application
from ddit.runtime.serving.models import ExpiredError, Model, UnavailableError
from ddit.runtime.serving.pictures import Told
from ddit.runtime.serving.ray_figures import ClusterFigures
from ddit.runtime.serving.schema import ImageRequest, Limits, ModelInfo
from ddit.runtime.serving.tickets import RoomFullError

log = logging.getLogger(__name__)

TOKEN = "DDIT_API_KEY"
ATTEMPTS = 4  # replicas that one request may cost
PAUSE = 0.5  # seconds before a model that cannot be reached is asked again who it is
LATE = 1.0  # seconds that a replica may take to say that a request's time is over
OPEN_REQUESTS = 10_000  # that an ingress replica holds, most of them waiting for engines


class IngressOptions(BaseModel):
    """The HTTP API, as a Serve config file may set it in ``args``. The key is in DDIT_API_KEY."""

    model_config = ConfigDict(extra="forbid")

    applications: list[str] = Field(min_length=1)  # names of those with engines; the first is the usual model
    limits: Limits = Limits()
    drain: float = Field(60.0, gt=0)  # seconds to finish what was accepted


def ingress(options: IngressOptions) -> Application:
    """The application."""
    return serve.deployment(Ingress).options(
        name="ingress",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=OPEN_REQUESTS,
        graceful_shutdown_timeout_s=options.drain,
    ).bind(options, os.environ.get(TOKEN) or None)  # fmt: skip


@serve.ingress()
class Ingress:
    """A replica of it."""

    def __init__(self, options: IngressOptions, token: str | None):
        self._options, self._token = options, token
        logging.basicConfig(level=logging.WARNING)
        logging.getLogger("ddit.access").setLevel(logging.INFO)

    def __serve_build_asgi_app__(self) -> FastAPI:
        figures = ClusterFigures()
        models = [RayModel(name, self._options.limits, figures) for name in self._options.applications]
        return application(models, figures, limits=self._options.limits, token=self._token)


class ReplicaLostError(Exception):
    """Whoever was making the pictures cannot go on."""


class RayModel(Model):
    """The model of an application with engines."""

    def __init__(self, name: str, limits: Limits, figures: ClusterFigures):
        self._name, self._limits, self._figures = name, limits, figures
        self._info: ModelInfo | None = None
        self._handle: DeploymentHandle | None = None
        self._learning: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Find out who it is."""
        self._learning = asyncio.get_running_loop().create_task(self._learn())

    async def _learn(self) -> None:
        while self._info is None:
            try:
                self._info = await self._engines().describe.remote()
                self._figures.engines[self._info.id] = self._engines()
            except Exception as error:  # whatever the cluster raises while it starts
                log.info("%s does not answer yet: %s", self._name, error)
                await asyncio.sleep(PAUSE)

    def _engines(self) -> DeploymentHandle:
        if self._handle is None:
            self._handle = serve.get_app_handle(self._name)
        return self._handle

    @property
    def broken(self) -> str | None:
        """Never: Serve replaces replicas."""
        return None

    @property
    def ready(self) -> bool:
        """Whether a replica has ever answered."""
        return self._info is not None

    async def info(self) -> ModelInfo:
        """Its name and what it can do. Raises `UnavailableError` before the first replica has answered."""
        if self._info is None:
            raise UnavailableError("the model is starting; try later")
        return self._info

    async def pictures(self, asked: ImageRequest) -> AsyncGenerator[Told, None]:
        """What is to be told of the pictures of a request, each once; see `Model`."""
        asked.check(self._limits)
        asked = asked.with_seed()
        until = monotonic() + self._limits.patience(asked)
        seen: set[tuple[object, ...]] = set()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with aclosing(self._of_a_replica(asked, until)) as pictures:
                    async for told in pictures:
                        if told.key not in seen:
                            seen.add(told.key)
                            yield told
                return
            except ReplicaLostError as error:
                self._figures.retried.inc()
                log.warning("a request is asked of another replica, %d of %d: %s", attempt, ATTEMPTS - 1, error)
                reason = str(error)
        raise BackendError(f"{ATTEMPTS} replicas have failed on this request: {reason}")

    async def _of_a_replica(self, asked: ImageRequest, until: float) -> AsyncGenerator[Told, None]:
        """What one replica tells. Raises `ReplicaLostError` where another one may do better."""
        left = until - monotonic()
        if left <= 0:
            raise ExpiredError("the picture took longer than the request's timeout")
        asked = asked.model_copy(update={"timeout": left})
        telling: Any = self._engines().options(stream=True).pictures.remote(asked)
        try:
            while True:
                told = await asyncio.wait_for(anext(telling), max(until - monotonic(), 0) + LATE)
                if isinstance(told, NotFiniteError) or not isinstance(told, BackendError | UnavailableError | Told):
                    raise told
                if not isinstance(told, Told):
                    raise ReplicaLostError(str(told))
                yield told
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError:
            raise ExpiredError("the picture took longer than the request's timeout") from None
        except BackPressureError:
            raise RoomFullError("too many requests wait for a replica; try later") from None
        except DeploymentUnavailableError:
            raise UnavailableError("no replica of this model works; try later") from None
        except (RayActorError, ObjectLostError) as error:
            raise ReplicaLostError(str(error).strip().splitlines()[0]) from None
        finally:
            telling.cancel()  # has no effect on what is done
