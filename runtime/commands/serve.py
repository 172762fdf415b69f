"""Serve a bundle over HTTP."""

import logging
import os
from ipaddress import ip_address
from pathlib import Path

import click

from ddit.runtime.backends.registry import open_backend
from ddit.runtime.bundle import Bundle
from ddit.runtime.commands.options import BACKEND, IN_FLIGHT, THREADS, VAE_TILING, Replicas, Seconds
from ddit.runtime.console import DditCommand, say
from ddit.runtime.errors import BackendError, UsageError
from ddit.runtime.pipeline import Pipeline
from ddit.runtime.tiling import check_side

TOKEN = "DDIT_API_KEY"


@click.command(cls=DditCommand)
@click.argument("bundles", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="BUNDLE...")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@IN_FLIGHT
@click.option("--waiting", type=click.IntRange(0, 100_000), default=256, show_default=True,
              help="Pictures that may wait; more are refused with 429.")  # fmt: skip
@click.option("--max-steps", type=click.IntRange(1, 1000), default=100, show_default=True)
@click.option("--max-pixels", type=click.IntRange(1), help="Of a picture.  [default: what the bundle's profile holds]")
@click.option("--max-prompt", type=click.IntRange(1, 100_000), default=4000, show_default=True, help="Characters.")
@click.option("--timeout", type=Seconds(), default=600.0, show_default=True,
              help="After which a request is given up.")  # fmt: skip
@click.option("--drain", type=Seconds(), default=60.0, show_default=True,
              help="To finish what was accepted, after SIGTERM.")  # fmt: skip
@click.option("--ray", is_flag=True, help="Serve on a Ray cluster: processes with the model on many GPUs and hosts, "
              "of several bundles too.")  # fmt: skip
@click.option("--replicas", type=Replicas(), help="With --ray: processes with each model, as in 4, or in 1-8 for as "
              "many as the queue asks for.  [default: 1 to the number of GPUs]")  # fmt: skip
@BACKEND
@THREADS
@VAE_TILING
def serve(
    bundles: tuple[Path, ...],
    host: str,
    port: int,
    in_flight: int,
    waiting: int,
    max_steps: int,
    max_pixels: int | None,
    max_prompt: int,
    timeout: float,
    drain: float,
    ray: bool,
    replicas: tuple[int, int] | None,
    backend: str | None,
    threads: int | None,
    vae_tiling: int | None,
) -> None:
    """Serve a bundle over HTTP, with OpenAI's image API, and for clips its videos API; with --ray on many machines.

    Clients need the key that the environment variable DDIT_API_KEY holds, where it is set.
    """
    try:
        from ddit.runtime.serving.schema import Limits
        from ddit.runtime.serving.server import listen
        from ddit.runtime.serving.server import serve as run

        if ray:
            from ddit.runtime.serving.ray_serve import serve_on_ray
    except ModuleNotFoundError as error:
        raise BackendError(
            f"{error.name} is not installed; run: pip install 'ddit[{'ray' if ray else 'serve'}]'"
        ) from None
    if not ray and (len(bundles) > 1 or replicas):
        raise UsageError("one process serves one bundle; for several, or for --replicas, add --ray")
    opened = [Bundle.open(bundle) for bundle in bundles]
    if ray and any(one.manifest.latent.has_frames for one in opened):
        raise UsageError("clips are served by one process, and --ray serves pictures; leave --ray out")
    ids = [one.manifest.model.id for one in opened]
    if len(set(ids)) < len(ids):
        raise UsageError(f"two bundles are of one model, and requests name models: {', '.join(ids)}; serve one of them")
    token = os.environ.get(TOKEN) or None
    if token is None and not _is_loopback(host):
        say(f"warning: anyone who reaches {host} may use this server; set {TOKEN} to ask for a key")
    limits = Limits(prompt=max_prompt, pixels=max_pixels, steps=max_steps, seconds=timeout)
    for one in opened:
        check_side(one.manifest.latent, vae_tiling)
    if ray:
        serve_on_ray(bundles, host, port, replicas=replicas, backend=backend, threads=threads, vae_tiling=vae_tiling,
                     limits=limits, in_flight=in_flight, waiting=waiting, drain=drain)  # fmt: skip
        return
    logging.getLogger("ddit.access").setLevel(logging.INFO)
    pipeline = Pipeline(opened[0], open_backend(backend, opened[0], threads), vae_tiling=vae_tiling)
    listening = listen(host, port)
    address, bound = listening.getsockname()[:2]
    say(f"http://{f'[{address}]' if ':' in address else address}:{bound} serves {ids[0]}")
    run(
        pipeline,
        listening,
        limits=limits,
        in_flight=in_flight,
        waiting=waiting,
        token=token,
        drain=drain,
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
