"""Bundles served on a Ray cluster until SIGTERM or Ctrl-C; what was accepted is finished first."""

import logging
import re
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus

from ddit.runtime.cluster import cluster, pool
from ddit.runtime.console import say
from ddit.runtime.errors import BackendError, UsageError
from ddit.runtime.serving.ray_engines import EngineOptions, engines
from ddit.runtime.serving.ray_ingress import IngressOptions, ingress
from ddit.runtime.serving.schema import Limits
from ddit.runtime.serving.server import listen

INGRESS = "ddit"
OUR_ERROR = re.compile(r"ddit\.runtime\.errors\.\w+: (.+)")  # in a replica's traceback


def serve_on_ray(
    bundles: Sequence[Path],
    host: str,
    port: int,
    *,
    replicas: tuple[int, int] | None,
    backend: str | None,
    threads: int | None,
    limits: Limits,
    in_flight: int,
    waiting: int,
    drain: float,
) -> None:
    """Serve until a signal. Raises `BackendError` where replicas refuse a bundle."""
    stopped = threading.Event()
    with cluster():
        least, most = pool(backend, replicas, len(bundles))
        options = [
            EngineOptions(
                bundle=str(bundle.resolve()), backend=backend, threads=threads, in_flight=in_flight, waiting=waiting,
                replicas=(least, most), limits=limits, drain=drain,
            )
            for bundle in bundles
        ]  # fmt: skip
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        others = serve.status().applications
        if INGRESS in others:
            raise UsageError("this Ray cluster serves bundles already; end that server first, or name all bundles here")
        if not others:
            with listen(host, port) as free:  # Serve's proxies would only log that it is not
                port = free.getsockname()[1]
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stopped.set())
        names: list[str] = []
        try:
            serve.start(http_options=HTTPOptions(host=host, port=port))
            there = _get_global_client().http_config  # whoever started Serve on this cluster has chosen it
            if (there.host, there.port) != (host, port):
                raise UsageError(f"Serve runs on this cluster already, at {there.host}, port {there.port}; "
                                 f"give --host {there.host} --port {there.port}, or end it")  # fmt: skip
            names = deploy(options, IngressOptions(applications=[INGRESS], limits=limits, drain=drain))
            say(f"http://{f'[{host}]' if ':' in host else host}:{port} serves {', '.join(map(str, bundles))}; "
                f"{least if least == most else f'{least} to {most}'} replicas of each")  # fmt: skip
            stopped.wait()
            say("finishing what was accepted")
        finally:
            for name in names:
                serve.delete(name)
            if not others:
                serve.shutdown()


def deploy(options: Sequence[EngineOptions], http: IngressOptions) -> list[str]:
    """Deploy engines, then the API over them; returns the applications' names in the order to delete them.

    Raises `BackendError` where replicas refuse a bundle.
    """
    names = [f"{INGRESS}-engines-{number}" for number in range(1, len(options) + 1)]
    targets = [
        serve.RunTarget(engines(one), name=name, route_prefix=None) for one, name in zip(options, names, strict=True)
    ]
    try:
        serve.run_many(targets)
        serve.run(ingress(http.model_copy(update={"applications": names})), name=INGRESS)
    except RuntimeError as error:
        reason = _reason(names) or str(error)
        for name in (INGRESS, *names):
            serve.delete(name)
        raise BackendError(f"a replica did not start: {reason}") from None
    return [INGRESS, *names]


def _reason(names: Sequence[str]) -> str | None:
    """Why an application could not be deployed, in our own words where they are ours."""
    for name, application in serve.status().applications.items():
        if name in names and application.status == ApplicationStatus.DEPLOY_FAILED:
            told = "\n".join([application.message, *(one.message for one in application.deployments.values())])
            found = OUR_ERROR.search(told)
            return found[1] if found else told.strip().splitlines()[-1]
    return None
