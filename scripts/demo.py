"""Show what prediction and levels do: a simple and a busy prompt, natively and under three other schedules.

python scripts/demo.py demo.bundle --out images
"""

from pathlib import Path

import click
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ddit.runtime import DditError, Pipeline, Result
from ddit.runtime.tools.plots import plot_complexity, plot_schedule

PROMPTS = {
    "simple": "a large red circle on a plain background",
    "busy": "a blue cross on a striped background",
}
SCHEDULES = ("native", "adaptive", "adaptive:0.2", "dynamic")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default="images", show_default=True)
@click.option("--seed", default=7, show_default=True)
@click.option("--steps", default=50, show_default=True)
def main(bundle: Path, out: Path, seed: int, steps: int) -> None:
    """Make the demo's pictures, traces and plots, and print the table."""
    try:
        pipeline = Pipeline.open(bundle)
        results = make(pipeline, seed, steps)
    except DditError as error:
        raise click.ClickException(str(error)) from None
    out.mkdir(parents=True, exist_ok=True)
    for (name, schedule), result in results.items():
        file = f"{name}-{schedule.replace(':', '-')}"
        result.image.save(out / f"{file}.png")
        (out / f"{file}.json").write_text(result.trace.to_json() + "\n", encoding="utf-8")
        if schedule != "native":
            plot_schedule(result.trace, out / f"{file}-schedule.png")
        if schedule == "dynamic" and result.trace.complexity:
            plot_complexity(result.frames, result.trace.complexity, out / f"{name}-map.png")
    side_by_side([result.image for result in results.values()]).save(out / "demo.png")
    Console().print(table(results))
    click.echo(f"pictures, traces and plots are in {out}/")


def make(pipeline: Pipeline, seed: int, steps: int) -> dict[tuple[str, str], Result]:
    """A result for every prompt and schedule, after a short run that loads every graph."""
    patches = pipeline.bundle.manifest.patches
    pipeline("warm up", schedule="fixed:" + ",".join(f"{patch}x1" for patch in patches))
    jobs = [(name, schedule) for name in PROMPTS for schedule in SCHEDULES]
    return {
        (name, schedule): pipeline(PROMPTS[name], seed=seed, steps=steps, schedule=schedule)
        for name, schedule in track(jobs, description="generating", transient=True)
    }


def table(results: dict[tuple[str, str], Result]) -> Table:
    """Steps and milliseconds by what they do, and the total against the native schedule."""
    patches = sorted({level for result in results.values() for level in result.trace.levels if level is not None})
    levels = [f"level {patch}:\nsteps × ms" for patch in patches]
    shown = Table(padding=0)
    for header in ("prompt", "schedule", *levels, "predicted:\nsteps × ms", "all\nsteps", "against\nnative"):
        shown.add_column(header, no_wrap=True)
    for (name, schedule), result in results.items():
        steps, times = result.trace.steps_per_level(), result.trace.milliseconds_per_level()
        total, native = result.trace.total_milliseconds(), results[name, "native"].trace.total_milliseconds()
        cells = [f"{steps[patch]} × {times[patch]:.1f}" if patch in steps else "–" for patch in patches]
        predicted = f"{result.trace.predicted} × {result.trace.milliseconds_predicted():.1f}"
        cells.append(predicted if result.trace.predicted else "–")
        shown.add_row(name, schedule, *cells, f"{total / 1000:.2f} s", f"{native / total:.2f}×")
    return shown


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """Pictures in a row."""
    row = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width
    return row


if __name__ == "__main__":
    main()
