"""Measure the spectrum of a model's latents and keep it."""

import dataclasses
from pathlib import Path

import click

from ddit.runtime import strict_json
from ddit.runtime.bundle import MANIFEST
from ddit.runtime.commands.options import BACKEND, BUNDLE, FRAMES, HEIGHT, JSON, THREADS, WIDTH, read_prompts
from ddit.runtime.console import DditCommand, say
from ddit.runtime.errors import UsageError
from ddit.runtime.files import check_outputs
from ddit.runtime.pipeline import Pipeline
from ddit.runtime.request import Request


@click.command(cls=DditCommand)
@BUNDLE
@click.option("--prompts", type=click.Path(path_type=Path), required=True, help="File with a prompt a line.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: the bundle's]")
@HEIGHT
@WIDTH
@FRAMES
@click.option("--dry-run", is_flag=True, help="Leave the bundle as it is.")
@BACKEND
@THREADS
@JSON
def spectrum(
    bundle: Path,
    prompts: Path,
    steps: int | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    dry_run: bool,
    backend: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure the spectrum of the model's latents, for progressive schedules.

    Native pictures of the prompts are made, one of each, with the seeds 0, 1, …; the power law that fits their latents
    best is kept in the bundle.
    """
    from ddit.runtime.tools.spectrum import measure

    texts = read_prompts(prompts)
    pipeline = Pipeline.open(bundle, backend=backend, threads=threads)
    if not dry_run:
        check_outputs([bundle / MANIFEST])  # now, not after hours
    requests = [
        Request(text, seed, steps, "native", height=height, width=width, frames=frames)
        for seed, text in enumerate(texts)
    ]
    runs = [pipeline.resolve([request]) for request in requests]
    if not runs:
        raise UsageError(f"{prompts} has no prompts; give a text file with a prompt a line")
    latents = []
    for number, run in enumerate(runs, 1):
        (latent,), _ = pipeline.denoise(run, pipeline.encode([run[0].prompt]))
        latents.append(latent)
        say(f"picture {number} of {len(runs)}")
    found = measure(latents)
    if not dry_run:
        pipeline.bundle.keep(lambda current: {"spectrum": found.spectrum})
    if as_json:
        click.echo(strict_json.dump(dataclasses.asdict(found) | {"spectrum": found.spectrum.model_dump()}, indent=2))
        return
    where = "not kept (--dry-run)" if dry_run else f"kept in {bundle / MANIFEST}"
    say(f"power {found.spectrum.amplitude:.4g} / ω^{found.spectrum.exponent:.4g}, {where}")
