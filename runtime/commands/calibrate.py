"""Find the number that a policy trades quality for speed by, and keep it."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from ddit.runtime import strict_json
from ddit.runtime.bundle import MANIFEST
from ddit.runtime.commands.options import (
    BACKEND,
    BUNDLE,
    FRAMES,
    HEIGHT,
    JSON,
    THREADS,
    WIDTH,
    check_type,
    read_prompts,
)
from ddit.runtime.console import DditCommand, say, terminal
from ddit.runtime.errors import UsageError
from ddit.runtime.files import check_outputs, whole
from ddit.runtime.pipeline import Pipeline
from ddit.runtime.policies import Reuse, TeaCache
from ddit.runtime.request import Request
from ddit.runtime.tools.plots import plot_types

if TYPE_CHECKING:
    from ddit.runtime.tools.calibrate_reuse import Setting


@click.command(cls=DditCommand)
@BUNDLE
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    required=True,
    help="File with a prompt a line; half of them are kept to test the result.",
)
@click.option("--speedup", type=click.FloatRange(1, min_open=True), help="Find the value that is so many times faster.")
@click.option(
    "--quality",
    type=click.FloatRange(0, 1, min_open=True),
    help="Find the fastest with such a mean SSIM to native.",
)
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: the bundle's]")
@HEIGHT
@WIDTH
@FRAMES
@click.option(
    "--schedule",
    default="adaptive",
    show_default=True,
    help="What is wanted: adaptive's tolerance, dynamic's τ (dynamic:rho=0.8,coarsest=4), another one's threshold.",
)
@click.option("--absolute", is_flag=True, help="An absolute τ, as in the paper, not one relative to smooth pictures.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw the curve (.png, .svg, .pdf).")
@click.option(
    "--reuse",
    type=click.Choice(["teacache", "dpcache"]),
    help="Not τ, but what a method of reuse keeps: teacache's polynomial, dpcache's choice of steps.",
)
@click.option("--computed", type=click.IntRange(1), help="Steps that dpcache computes.  [default: a third of all]")
@click.option("--dry-run", is_flag=True, help="Leave the bundle as it is.")
@BACKEND
@THREADS
@JSON
def calibrate(
    bundle: Path,
    prompts: Path,
    speedup: float | None,
    quality: float | None,
    steps: int | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    schedule: str,
    absolute: bool,
    plot_file: Path | None,
    reuse: str | None,
    computed: int | None,
    dry_run: bool,
    backend: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Find a policy's tolerance, τ or threshold, and keep it.

    For a number of steps, a size and the backend, in the bundle. With --reuse, what a method of reuse keeps there.

    --speedup 2 unless --quality is given.
    """
    from ddit.runtime.tools import calibrate as calibration
    from ddit.runtime.tools.calibrate_reuse import Setting

    if speedup is not None and quality is not None:
        raise UsageError("give --speedup or --quality, not both: one number cannot be chosen by two measures")
    if reuse and (speedup or quality or absolute or plot_file):
        raise UsageError("--speedup, --quality, --absolute and --plot are for the search; leave them out, or --reuse")
    if computed and reuse != "dpcache":
        raise UsageError("--computed is dpcache's; give --reuse dpcache too")
    if plot_file:
        check_outputs([plot_file])
        check_type(plot_file, plot_types())
    target = calibration.Target(speedup=2.0 if speedup is None and quality is None else speedup, similarity=quality)
    texts = read_prompts(prompts)
    pipeline = Pipeline.open(bundle, backend=backend, threads=threads)
    if not dry_run:
        check_outputs([bundle / MANIFEST])  # now, not after hours
    manifest = pipeline.bundle.manifest
    size, steps = manifest.size(height=height, width=width, frames=frames), steps or manifest.sampler.steps
    options = {"steps": steps, **size.by_name()}
    for text in texts:
        pipeline.resolve([Request(text, schedule="native", **options)])  # type: ignore[arg-type]
    if reuse:
        _calibrate_reuse(pipeline, reuse, texts, Setting(steps, size), computed, dry_run, as_json)
        return
    calibration.halves(texts)
    wanted = pipeline.policy(schedule, **options)
    calibrator = calibration.Calibrator(pipeline, wanted, steps=steps, size=size)
    found = calibration.search(calibrator, texts, target, say, relative=not absolute)
    best = found.best(target)
    kept = calibration.calibration(calibrator, found, best)
    if kept and not dry_run:
        pipeline.bundle.calibrate(kept)
    if plot_file:
        with whole(plot_file) as part:
            calibration.plot(found, best, calibrator.letter, part)
    if as_json:
        settings = kept.model_dump(exclude={"curve"}) if kept else {}
        report = {"schedule": str(calibrator.policy.turned(best.value)), "value": best.value, **settings}
        click.echo(strict_json.dump({**report, **dataclasses.asdict(found)}, indent=2))
        return
    table = Table("prompts", "number", "speed-up", "spread", "SSIM to native", "cheaper steps")
    assert found.held_out is not None
    for name, point in ((f"{calibrator.letter} was chosen on", best), ("others", found.held_out)):
        table.add_row(name, str(len(point.samples)), f"{point.speedup:.2f}×", *calibration.spread(point))
    terminal().print(table)
    where = f"kept in {bundle / MANIFEST}" if kept and not dry_run else "not kept"
    how = "" if kept else "; give it as --schedule"
    say(f"{calibrator.policy.turned(best.value)} for {steps} steps at {size}, {where}{how}")


def _calibrate_reuse(
    pipeline: Pipeline,
    reuse: str,
    texts: list[str],
    setting: "Setting",
    computed: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Find what a method of reuse keeps in the bundle, try it on the held-out prompts, and keep it."""
    from ddit.runtime.tools import calibrate_reuse as calibration

    method: Reuse
    if reuse == "dpcache":
        path = calibration.find_path(pipeline, texts, setting, computed or -(-setting.steps // 3), say)
        method, figures = calibration.path_reuse(path), path.model_dump()
        line = f"dpcache computes steps {', '.join(map(str, path.computed))} of {path.steps}"
    else:
        gate, error = calibration.fit_gate(pipeline, texts, setting, say)
        method, figures = TeaCache(gate.coefficients), {**gate.model_dump(), "error": error}
        line = f"teacache's polynomial misses the change of the velocity by {error:.2g}"
    held_out = calibration.try_reuse(pipeline, texts, setting, method, say)
    if not dry_run and reuse == "dpcache":
        pipeline.bundle.keep_path(path)
    elif not dry_run:
        pipeline.bundle.keep(lambda _: {"gate": gate})
    if as_json:
        click.echo(strict_json.dump({**figures, "held_out": dataclasses.asdict(held_out)}, indent=2))
        return
    say(f"{method} on {held_out.prompts} other prompts: {held_out.computed:g} of {setting.steps} steps computed, "
        f"SSIM to native {held_out.similarity:.3f}")  # fmt: skip
    say(f"{line}, {'not kept (--dry-run)' if dry_run else f'kept in {pipeline.bundle.path / MANIFEST}'}")
