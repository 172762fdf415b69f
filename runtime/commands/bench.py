"""Measure a denoising step at every level."""

import dataclasses
from pathlib import Path

import click
from rich.table import Table

from ddit.runtime import strict_json
from ddit.runtime.backends.registry import open_backend
from ddit.runtime.bundle import Bundle
from ddit.runtime.commands.options import BACKEND, BUNDLE, FRAMES, HEIGHT, JSON, THREADS, WIDTH
from ddit.runtime.console import DditCommand, say, terminal


@click.command(cls=DditCommand)
@BUNDLE
@HEIGHT
@WIDTH
@FRAMES
@click.option(
    "--repeat", type=click.IntRange(1, 5000), default=30, show_default=True, help="Steps to time at each level."
)
@BACKEND
@THREADS
@JSON
def bench(
    bundle: Path,
    height: int | None,
    width: int | None,
    frames: int | None,
    repeat: int,
    backend: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure a denoising step at every level.

    Median milliseconds, tokens, peak memory.
    """
    from ddit.runtime.tools.bench import Job
    from ddit.runtime.tools.bench import bench as measure

    opened = Bundle.open(bundle)
    manifest = opened.manifest
    chosen = open_backend(backend, opened, threads).name
    size = manifest.size(height=height, width=width, frames=frames)
    manifest.sizes(size, text=manifest.text_length)
    with opened.unchanged():  # every level is measured in a process that opens the bundle anew
        measured = measure(Job(bundle, chosen, threads, size), manifest, repeat)
    if as_json:
        click.echo(strict_json.dump([dataclasses.asdict(one) for one in measured], indent=2))
        return
    native = next(one.milliseconds for one in measured if one.level == manifest.native)
    memory = "host memory" if measured[0].gpu_memory_mb is None else "host, GPU memory"
    table = Table("level", "image tokens", "ms per step", "fastest–slowest", "against native", memory)
    for one in measured:
        table.add_row(
            str(one.level),
            str(one.image_tokens),
            f"{one.milliseconds:.1f}",
            f"{one.fastest:.1f}–{one.slowest:.1f}",
            f"{native / one.milliseconds:.2f}×",
            f"{one.peak_memory_mb:.0f} MB" + ("" if one.gpu_memory_mb is None else f", {one.gpu_memory_mb:.0f} MB"),
        )
    terminal().print(table)
    say(f"backend: {chosen}")
