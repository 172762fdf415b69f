"""A Ray Serve application whose replicas each have a bundle's engines and an engine room over them."""

import logging
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from ddit.runtime.backends.registry import open_backend
from ddit.runtime.bundle import Bundle
from ddit.runtime.cluster import of_a_process
from ddit.runtime.errors import BackendError, DditError, UsageError
from ddit.runtime.pipeline import Pipeline
from ddit.runtime.serving.metrics import Metrics
from ddit.runtime.serving.models import LocalModel
from ddit.runtime.serving.pictures import Told
from ddit.runtime.serving.schema import MAX_PICTURES, ImageRequest, Limits, ModelInfo
from ddit.runtime.serving.server import SWITCH_SECONDS, make_worker, without_prompts

log = logging.getLogger(__name__)

HEALTH_SECONDS = 5.0  # between two questions whether a replica works
QUEUE = 2  # times the pictures in flight: what a replica takes, so that it has work while the router looks for room
BACKOFF_SECONDS = 0.1  # at most, before the router looks again for a replica that has room
BUSY_SHARE = 0.5  # of the pictures in flight that a replica has on average when one more is started


class EngineOptions(BaseModel):
    """A bundle's engines, as a Serve config file may set them in ``args``."""

    model_config = ConfigDict(extra="forbid")

    bundle: str  # its folder, at the same path on every machine
    backend: str | None = None
    threads: int | None = Field(None, ge=1)
    vae_tiling: int | None = None  # side in pixels of the tiles in which larger pictures are decoded
    in_flight: int = Field(32, ge=1, le=1024)  # pictures that a replica denoises at once
    waiting: int = Field(256, ge=0)  # requests that wait in the ingress while all replicas are full
    replicas: Annotated[tuple[int, int], Field(description="the fewest and the most")] = (1, 1)
    limits: Limits = Limits()
    drain: float = Field(60.0, gt=0)  # seconds to finish what was accepted


def engines(options: EngineOptions) -> Application:
    """The application; its name in the cluster is what `ddit.runtime.serving.ray_ingress` is told."""
    least, most = options.replicas
    scaling: dict[str, Any] = {"num_replicas": least}
    if least < most:
        busy = max(1.0, BUSY_SHARE * options.in_flight)
        scaling = {"autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": busy}}
    return serve.deployment(Engines).options(
        name="engines",
        **scaling,
        ray_actor_options=of_a_process(options.backend),
        max_ongoing_requests=QUEUE * options.in_flight,
        request_router_config=RequestRouterConfig(max_backoff_s=BACKOFF_SECONDS),
        max_queued_requests=options.waiting,
        graceful_shutdown_timeout_s=options.drain,
        health_check_period_s=HEALTH_SECONDS,
    ).bind(options)  # fmt: skip


class Engines:
    """A replica. Its constructor ends when a first picture was made, or says why this machine cannot."""

    def __init__(self, options: EngineOptions):
        self._quiet = without_prompts()
        self._quiet.__enter__()  # until the process ends
        sys.setswitchinterval(SWITCH_SECONDS)
        opened = Bundle.open(options.bundle)
        if opened.manifest.latent.has_frames:
            raise UsageError("this bundle makes clips, and the server answers with pictures; use ddit-run generate")
        pipeline = Pipeline(
            opened, open_backend(options.backend, opened, options.threads), vae_tiling=options.vae_tiling
        )
        self._metrics = Metrics(opened.manifest)
        worker = make_worker(
            pipeline, self._metrics, in_flight=options.in_flight, waiting=QUEUE * options.in_flight * MAX_PICTURES
        )
        self._model = LocalModel(worker, options.limits)
        self._model.start()
        while not worker.ready.wait(0.05):
            if worker.broken:
                raise BackendError(worker.broken)
        worker.on_break = self._die

    async def pictures(self, asked: ImageRequest) -> AsyncGenerator[Told | DditError, None]:
        """What is to be told of a request's pictures, or last of all what kept them from being made."""
        try:
            async with aclosing(self._model.pictures(asked)) as pictures:
                async for told in pictures:
                    yield told
        except DditError as error:
            if self._model.broken:
                self._die()
            yield error

    async def describe(self) -> ModelInfo:
        """The model's name and what it can do."""
        return await self._model.info()

    async def figures(self) -> tuple[str, str]:
        """This replica's name and its figures, as Prometheus reads them."""
        return serve.get_replica_context().replica_tag, (await self._metrics.text()).decode()

    def check_health(self) -> None:
        """Raise where only another replica can help."""
        if self._model.broken:
            raise BackendError(self._model.broken)

    def _die(self) -> None:
        """End at once, so that others take over what is open here, and nothing new arrives."""
        log.error("this replica ends: %s", self._model.broken)
        os._exit(1)
