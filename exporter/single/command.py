"""ddit-export single."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ddit.runtime import strict_json
from ddit.runtime.bundle import Bundle
from ddit.runtime.commands.options import BUNDLE, HEIGHT, JSON, WIDTH
from ddit.runtime.console import DditCommand, say
from ddit.runtime.errors import ModelError

if TYPE_CHECKING:
    from ddit.exporter.single.write import Weights


@click.command(cls=DditCommand)
@BUNDLE
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--schedule",
    help="What the model does unless its caller says otherwise: native, fixed:8x10,4x20,2x20 or "
    "dynamic[:tau=…,rho=…,warmup=…,hold=…,coarsest=…,absolute=…], each with +adaptive[:tolerance] or without.  "
    "[default: adaptive]",
)
@click.option("--steps", type=int, help="Its number of steps, likewise.  [default: the bundle's]")
@HEIGHT
@WIDTH
@click.option(
    "--backend",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Whose calibrations are taken for these steps and this size, and for which provider's kernels the levels are.",
)
@click.option(
    "--weights",
    type=click.Choice(["copy", "bundle"]),
    default="copy",
    show_default=True,
    help="Write them to OUT.data, or point into the bundle, which has to lie below OUT's folder then.",
)
@click.option("--check/--no-check", default=True, help="Compare its pictures with the runtime's.  [default: check]")
@JSON
def single(
    bundle: Path,
    out: Path,
    schedule: str | None,
    steps: int | None,
    height: int | None,
    width: int | None,
    backend: str,
    weights: "Weights",
    check: bool,
    as_json: bool,
) -> None:
    """Write a bundle as one ONNX model, whose one call makes a picture. Needs no torch."""
    opened = Bundle.open(bundle)
    try:
        from ddit.exporter.single.defaults import find_defaults
        from ddit.exporter.single.write import write_single
    except ImportError as error:
        raise ModelError(f"exporting needs {error.name}; install it with: pip install 'ddit[export]'") from None
    defaults = find_defaults(opened.manifest, schedule, steps=steps, height=height, width=width, backend=backend)
    done = write_single(opened, out, defaults, backend=backend, weights=weights, check=check, report=say)
    if as_json:
        click.echo(strict_json.dump({"files": done.files, "pixels": done.pixels, "unchecked": done.unchecked}))
        return
    if done.unchecked:
        say(f"warning: not compared with the runtime: {done.unchecked}")
    found = "" if done.pixels is None else f"; its pictures are the runtime's to {done.pixels}/255"
    say(", ".join(f"{path} {size / 1e6:,.1f} MB" for path, size in done.files.items()) + found)
