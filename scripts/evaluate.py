"""Compare patch schedules with the native one: quality, compute, time. docs/evaluate.md tells how to read the report.

    python scripts/evaluate.py demo.bundle --prompts scenes:100 --out runs/evaluation \\
        --schedule native --schedule dynamic --schedule dynamic:tau=2 --schedule fixed:8x10,4x20,2x20

Pictures that are already under --out are not made again: a run that was interrupted goes on where it stopped, and
another schedule, prompt or metric costs only what it adds.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from command_line.options import argument, option, options
from ddit.runtime import Bundle, Pipeline
from ddit.runtime.bundle import MANIFEST
from ddit.runtime.console import DditCommand, say, set_up_logging
from ddit.runtime.errors import UsageError
from ddit.runtime.policies import Fixed
from ddit.runtime.shapes import Size

try:
    from demo_model.scenes import BACKGROUNDS
    from evaluation.flops import level_flops
    from evaluation.measure import NATIVE, load_metrics, measure
    from evaluation.metrics import METRICS
    from evaluation.report import Facts, write_report
    from evaluation.samples import read_samples
    from evaluation.store import Settings, Store, describe_machine, make_missing
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error.name} is not installed: pip install 'ddit[cpu,evaluate]'") from None


@dataclass(frozen=True, kw_only=True)
class Config:
    """What was asked for. None leaves a value to the bundle."""

    bundle: Path = argument(type=click.Path(path_type=Path))

    # ---- the pictures ----
    prompts: str = option(
        required=True,
        help="A file with a prompt a line, or the demos' scenes or clips: scenes:N, clips:START-STOP and so on.",
    )
    background: str | None = option(type=click.Choice(BACKGROUNDS), help="Only scenes with this background.")
    seeds: int = option(type=click.IntRange(1), default=1, help="Pictures of every prompt.")
    steps: int | None = option(type=click.IntRange(1), help="Denoising steps.  [default: the bundle's]")
    schedules: tuple[str, ...] = option(
        "--schedule",
        multiple=True,
        default=("dynamic",),
        help="What to compare with native, as for ddit-run generate. Give it several times.",
    )
    metrics: tuple[str, ...] = option(
        "--metric",
        multiple=True,
        type=click.Choice(list(METRICS)),
        help="What to measure. Give it several times.  [default: all that can be measured here]",
    )
    against: Path | None = option(
        type=click.Path(path_type=Path, file_okay=False),
        help="Compare with the native pictures of another --out, as of another backend.  [default: with its own]",
    )
    out: Path = option(type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the results.")

    # ---- how they are made ----
    batch: int = option(type=click.IntRange(1), default=1, help="Pictures to make at once.")
    height: int | None = option(type=int, help="Pixels.  [default: the profile's optimum]")
    width: int | None = option(type=int, help="Pixels.  [default: the profile's optimum]")
    frames: int | None = option(type=click.IntRange(1), help="Of a clip.  [default: the profile's optimum]")
    guidance: float | None = option(type=float, help="Guidance scale.  [default: the bundle's]")
    carry: float | None = option(
        type=float, help="Share of native detail that coarse steps take over.  [default: the bundle's]"
    )
    backend: str = option(default="cpu", help="cpu, cuda, or an ONNX Runtime execution provider.")
    threads: int | None = option(type=click.IntRange(1), help="Threads of one graph.  [default: all cores]")


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@options(Config)
def main(**given: Any) -> None:
    """Compare schedules with the native one, picture by picture: the same prompts, seeds and steps."""
    set_up_logging(0)
    config = Config(**given)
    # before the work, not after it: whatever would keep the results from being what was asked for
    samples = read_samples(config.prompts, config.seeds, config.background)
    functions, skipped = load_metrics(config.metrics, samples)
    pipeline = Pipeline.open(config.bundle, backend=config.backend, threads=config.threads)
    steps = config.steps or pipeline.bundle.manifest.sampler.steps
    schedules = tuple(dict.fromkeys((NATIVE, *config.schedules)))
    check_schedules(pipeline, schedules, steps)
    settings = find_settings(config, pipeline.bundle)
    flops = level_flops(pipeline.bundle, size=settings.size, guidance=settings.guidance)
    store = Store(config.out, steps, settings.frames or 1)
    against = Store(config.against, steps, settings.frames or 1) if config.against else None
    if against and not all(against.has(NATIVE, sample) for sample in samples):
        raise UsageError(
            f"{config.against} lacks native pictures of these prompts; run the same command with that --out"
        )
    make_missing(store, pipeline, schedules, samples, settings)

    measured, floors = measure(store, schedules, samples, functions, against)
    facts = Facts(
        bundle=describe_bundle(pipeline.bundle),
        prompts=config.prompts if config.background is None else f"{config.prompts}, {config.background} ones",
        seeds=config.seeds,
        settings=settings,
        flops=flops,
        smaller={
            (height, width): level_flops(
                pipeline.bundle, size=Size(height, width, settings.frames), guidance=settings.guidance
            )
            for height, width in {
                tuple(size) for one in measured for record in one.records for size in record.smaller.values()
            }
        },
        native=pipeline.bundle.manifest.native,
        skipped=skipped,
        floors=floors,
        against=config.against,
    )
    write_report(config.out, store, measured, samples, [METRICS[name] for name in functions], facts)
    say(f"results.csv, pictures.csv, report.md, plot.png and grid.png are in {config.out}/")


def find_settings(config: Config, bundle: Bundle) -> Settings:
    """What all pictures are made with; the bundle says what was not asked for."""
    manifest = bundle.manifest
    size = manifest.size(height=config.height, width=config.width, frames=config.frames)
    return Settings(
        bundle=hashlib.sha256((config.bundle / MANIFEST).read_bytes()).hexdigest(),
        backend=config.backend,
        threads=config.threads,
        batch=config.batch,
        height=size.height,
        width=size.width,
        frames=size.frames,
        guidance=manifest.guidance.default if config.guidance is None else config.guidance,
        carry=manifest.carry if config.carry is None else config.carry,
        machine=describe_machine(config.backend),
    )


def check_schedules(pipeline: Pipeline, schedules: Sequence[str], steps: int) -> None:
    """See that every schedule can be read and has the right number of steps. Raises `UsageError`."""
    for text in schedules:
        schedule = pipeline.policy(text)
        if isinstance(schedule, Fixed) and len(schedule.levels) != steps:
            raise UsageError(f"{text} has {len(schedule.levels)} steps, not {steps}; all schedules need as many")


def describe_bundle(bundle: Bundle) -> str:
    """A bundle in a line, for the report."""
    manifest = bundle.manifest
    levels = ", ".join(
        f"{patch}" + ("" if manifest.level(patch).trained else " (untrained)") for patch in manifest.patches
    )
    return f"{manifest.model.id}, {manifest.dtype}, levels {levels}, default τ {manifest.schedule.tau:g}"


if __name__ == "__main__":
    main()
