"""Bundles served on a Ray cluster until SIGTERM or Ctrl-C; what was accepted is finished first."""

import logging
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, sleep

from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus

from ddit.runtime.cluster import cluster, pool, reason
from ddit.runtime.console import say
from ddit.runtime.errors import BackendError, UsageError
from ddit.runtime.serving.ray_engines import EngineOptions, engines
from ddit.runtime.serving.ray_ingress import IngressOptions, ingress
from ddit.runtime.serving.schema import Limits
from ddit.runtime.serving.server import listen

INGRESS, ENGINES = "ddit", "ddit-engines-"  # the applications' names, the latter with a number
END_SECONDS = 20.0  # that an idle application takes to end, at most
POLL_SECONDS = 0.1


def serve_on_ray(
    bundles: Sequence[Path],
    host: str,
    port: int,
    *,
    replicas: tuple[int, int] | None,
    backend: str | None,
    threads: int | None,
    vae_tiling: int | None,
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
                bundle=str(bundle.resolve()), backend=backend, threads=threads, vae_tiling=vae_tiling,
                in_flight=in_flight, waiting=waiting, replicas=(least, most), limits=limits, drain=drain,
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
        try:
            serve.start(http_options=HTTPOptions(host=host, port=port))
            http = _get_global_client().http_config  # whoever started Serve on this cluster has chosen it
            if (http.host, http.port) != (host, port):
                raise UsageError(f"Serve runs on this cluster already, at {http.host}, port {http.port}; "
                                 f"give --host {http.host} --port {http.port}, or end it")  # fmt: skip
            deploy(options, limits, drain)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stopped.set())
            say(f"http://{f'[{host}]' if ':' in host else host}:{port} serves {', '.join(map(str, bundles))}; "
                f"{least if least == most else f'{least} to {most}'} replicas of each")  # fmt: skip
            stopped.wait()
            say("finishing what was accepted")
        finally:
            there = [*serve.status().applications]
            engines_of_ours = [name for name in there if name.startswith(ENGINES)]
            if INGRESS in there:  # first: engines are idle once it has finished what it accepted
                _delete(INGRESS, drain + END_SECONDS)
            if len(there) > len(engines_of_ours) + (INGRESS in there):  # somebody else's too
                for name in engines_of_ours:
                    _delete(name, END_SECONDS)
            else:
                serve.shutdown()


def deploy(options: Sequence[EngineOptions], limits: Limits, drain: float) -> None:
    """Deploy engines, then the API over them. Raises `BackendError` where replicas refuse a bundle."""
    names = [f"{ENGINES}{number}" for number in range(1, len(options) + 1)]
    targets = [
        serve.RunTarget(engines(one), name=name, route_prefix=None) for one, name in zip(options, names, strict=True)
    ]
    try:
        serve.run_many(targets)
        serve.run(ingress(IngressOptions(applications=names, limits=limits, drain=drain)), name=INGRESS)
    except RuntimeError as error:
        raise BackendError(f"a replica did not start: {reason(_told(names) or str(error))}") from None


def _delete(name: str, seconds: float) -> None:
    """Delete an application, and wait so long for its end; Serve itself waits no more than a minute."""
    serve.delete(name, _blocking=False)
    until = monotonic() + seconds
    while name in serve.status().applications and monotonic() < until:
        sleep(POLL_SECONDS)


def _told(names: Sequence[str]) -> str | None:
    """What Serve tells of the first application that could not be deployed."""
    for name, application in serve.status().applications.items():
        if name in names and application.status == ApplicationStatus.DEPLOY_FAILED:
            return "\n".join([application.message, *(one.message for one in application.deployments.values())])
    return None
