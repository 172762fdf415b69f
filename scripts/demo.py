"""Show what prediction and levels do: a simple and a busy prompt, natively and under three other schedules.

python scripts/demo.py demo.bundle --out images
python scripts/demo.py demo-video.bundle --out images      # clips
"""

from collections.abc import Sequence
from pathlib import Path

import click
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ddit.runtime import DditError, Pipeline, Result
from ddit.runtime.bundle.manifest import VideoDecoderInfo
from ddit.runtime.tools.plots import plot_complexity, plot_schedule
from ddit.runtime.video import save_clip

PROMPTS = {
    "simple": "a large red circle on a plain background",
    "busy": "a blue cross on a striped background",
}
CLIPS = {
    "simple": "a yellow triangle changing into a circle on a gradient background",
    "busy": "a purple circle at the top shrinking on a drifting striped background",
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
    decoder = pipeline.bundle.manifest.decoder
    out.mkdir(parents=True, exist_ok=True)

    def save(frames: Sequence[Image.Image], name: str) -> None:
        if isinstance(decoder, VideoDecoderInfo):
            save_clip(frames, out / f"{name}.webp", decoder.frames_per_second)
        else:
            frames[0].save(out / f"{name}.png")

    for (name, schedule), result in results.items():
        file = f"{name}-{schedule.replace(':', '-')}"
        save(result.frames, file)
        (out / f"{file}.json").write_text(result.trace.to_json() + "\n", encoding="utf-8")
        if schedule != "native":
            plot_schedule(result.trace, out / f"{file}-schedule.png")
        if schedule == "dynamic" and result.trace.complexity:
            plot_complexity(result.frames, result.trace.complexity, out / f"{name}-map.png")
    frames = zip(*(result.frames for result in results.values()), strict=True)
    save([side_by_side(images) for images in frames], "demo")
    Console().print(table(results))
    click.echo(f"pictures, traces and plots are in {out}/")


def make(pipeline: Pipeline, seed: int, steps: int) -> dict[tuple[str, str], Result]:
    """A result for every prompt and schedule, after a short run that loads every graph."""
    manifest = pipeline.bundle.manifest
    prompts = CLIPS if manifest.latent.has_frames else PROMPTS
    pipeline("warm up", schedule="fixed:" + ",".join(f"{patch}x1" for patch in manifest.patches))
    jobs = [(name, schedule) for name in prompts for schedule in SCHEDULES]
    return {
        (name, schedule): pipeline(prompts[name], seed=seed, steps=steps, schedule=schedule)
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


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size, those of a prompt in a row."""
    width, height = images[0].size
    grid = Image.new("RGB", (width * len(SCHEDULES), height * (len(images) // len(SCHEDULES))))
    for number, image in enumerate(images):
        row, column = divmod(number, len(SCHEDULES))
        grid.paste(image, (column * width, row * height))
    return grid


if __name__ == "__main__":
    main()
