"""Serve a bundle over HTTP."""

import logging
import os
from ipaddress import ip_address
from pathlib import Path

import click

from ddit.runtime.backends.registry import open_backend
from ddit.runtime.bundle import Bundle
from ddit.runtime.commands.options import BACKEND, BUNDLE, THREADS, Seconds
from ddit.runtime.console import DditCommand, say
from ddit.runtime.errors import BackendError
from ddit.runtime.pipeline import Pipeline

TOKEN = "DDIT_API_KEY"


@click.command(cls=DditCommand)
@BUNDLE
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 for all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--in-flight", type=click.IntRange(1, 1024), default=32, show_default=True,
              help="Pictures that denoise at once.")  # fmt: skip
@click.option("--waiting", type=click.IntRange(0, 100_000), default=256, show_default=True,
              help="Pictures that may wait; more are refused with 429.")  # fmt: skip
@click.option("--max-steps", type=click.IntRange(1, 1000), default=100, show_default=True)
@click.option("--max-pixels", type=click.IntRange(1), help="Of a picture.  [default: what the bundle's profile holds]")
@click.option("--max-prompt", type=click.IntRange(1, 100_000), default=4000, show_default=True, help="Characters.")
@click.option("--timeout", type=Seconds(), default=600.0, show_default=True,
              help="After which a request is given up.")  # fmt: skip
@click.option("--drain", type=Seconds(), default=60.0, show_default=True,
              help="To finish what was accepted, after SIGTERM.")  # fmt: skip
@BACKEND
@THREADS
def serve(
    bundle: Path,
    host: str,
    port: int,
    in_flight: int,
    waiting: int,
    max_steps: int,
    max_pixels: int | None,
    max_prompt: int,
    timeout: float,
    drain: float,
    backend: str | None,
    threads: int | None,
) -> None:
    """Serve a bundle over HTTP, with OpenAI's image API, and for clips with its videos API.

    Clients need the key that the environment variable DDIT_API_KEY holds, where it is set.
    """
    try:
        from ddit.runtime.serving.schema import Limits
        from ddit.runtime.serving.server import listen
        from ddit.runtime.serving.server import serve as run
    except ModuleNotFoundError as error:
        raise BackendError(f"{error.name} is not installed; run: pip install 'ddit[serve]'") from None
    opened = Bundle.open(bundle)
    token = os.environ.get(TOKEN) or None
    if token is None and not _is_loopback(host):
        say(f"warning: anyone who reaches {host} may use this server; set {TOKEN} to ask for a key")
    logging.getLogger("ddit.access").setLevel(logging.INFO)
    pipeline = Pipeline(opened, open_backend(backend, opened, threads))
    listening = listen(host, port)
    address, bound = listening.getsockname()[:2]
    say(f"http://{f'[{address}]' if ':' in address else address}:{bound} serves {opened.manifest.model.id}")
    run(
        pipeline,
        listening,
        limits=Limits(prompt=max_prompt, pixels=max_pixels, steps=max_steps, seconds=timeout),
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
