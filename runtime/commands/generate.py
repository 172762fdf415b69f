"""Make one picture or clip, or all those of a file of prompts."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar

from ddit.runtime import strict_json
from ddit.runtime.backends.registry import open_backend
from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.manifest import VideoDecoderInfo
from ddit.runtime.commands.generate_many import generate_many
from ddit.runtime.commands.options import (
    BACKEND,
    BUNDLE,
    FRAMES,
    HEIGHT,
    IN_FLIGHT,
    JSON,
    LOW_MEMORY,
    THREADS,
    VAE_TILING,
    WIDTH,
    Replicas,
    Seconds,
    check_type,
)
from ddit.runtime.console import DditCommand, say, terminal
from ddit.runtime.denoise import Progress
from ddit.runtime.errors import UsageError
from ddit.runtime.files import check_outputs, whole
from ddit.runtime.pipeline import Pipeline
from ddit.runtime.policies.parse import join_schedule
from ddit.runtime.saving import PICTURES, save_frames, save_picture
from ddit.runtime.tools.plots import plot_complexity, plot_schedule, plot_types
from ddit.runtime.trace import StepRecord, Trace
from ddit.runtime.video import check_clip_type, frame_files


@click.command(cls=DditCommand)
@BUNDLE
@click.argument("prompt", required=False)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="A file of prompts in place of one: JSON Lines (.jsonl) or CSV (.csv), each line with a prompt, and with id, "
    "file, seed, size, steps, … of its own where the options here shall not hold. --out is a folder then.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--steps", type=int, help="Denoising steps.  [default: the bundle's]")
@click.option(
    "--schedule",
    help="native, fixed:8x10,4x20,2x20 or dynamic[:tau=…,rho=…,warmup=…,hold=…,coarsest=…,absolute=…], with "
    "+adaptive[:tolerance] or a method of --reuse and with +progressive[:delta=…,scales=…,adaptive], or with these "
    "alone.  [default: adaptive]",
)
@click.option(
    "--reuse",
    help="Which steps run no level; the same as SCHEDULE+REUSE. taylorseer[:interval=…,order=…,first=…], "
    "teacache[:threshold=…], spectralcache[:threshold=…,low=…,high=…,least=…,most=…,longest=…], dpcache or "
    "adaptive[:tolerance]; a number alone is the first setting, as in teacache:0.4.",
)
@click.option(
    "--budget", type=Seconds(), help="Seconds for all of it, as in 1.5s or 800ms; chooses the schedule itself."
)
@HEIGHT
@WIDTH
@FRAMES
@click.option("--guidance", type=float, help="Guidance scale.  [default: the bundle's]")
@click.option("--negative-prompt", help="What it shall not show, for models that are guided by two passes.")
@click.option(
    "--carry", type=float, help="Share of native detail that coarse steps take over.  [default: the bundle's]"
)
@click.option("--text-length", type=click.IntRange(1), help="Tokens of the prompt.  [default: the bundle's]")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Picture to write; or a clip (.mp4, .webp, .gif), or with %d its frames, as in frames/%03d.png.  "
    "With --prompts a folder; what is finished there is not made again.  [default: out.png, out.mp4, out]",
)
@click.option(
    "--fps", type=click.FloatRange(0, 1000, min_open=True), help="Frames per second.  [default: the bundle's]"
)
@click.option("--trace", "trace_file", type=click.Path(path_type=Path), help="Write what every step did as JSON.")
@click.option(
    "--plot", "plot_file", type=click.Path(path_type=Path), help="Draw levels and statistics (.png, .svg, .pdf)."
)
@click.option("--map", "map_file", type=click.Path(path_type=Path), help="Draw where and when there was detail.")
@IN_FLIGHT
@click.option("--ray", is_flag=True, help="With --prompts: spread the work over a Ray cluster.")
@click.option("--replicas", type=Replicas(), help="With --ray: processes with the model, as in 4 or 1-8.  "
              "[default: one a GPU]")  # fmt: skip
@BACKEND
@THREADS
@LOW_MEMORY
@VAE_TILING
@JSON
@click.pass_context
def generate(
    context: click.Context,
    bundle: Path,
    prompt: str | None,
    prompts: Path | None,
    seed: int,
    steps: int | None,
    schedule: str | None,
    reuse: str | None,
    budget: float | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    guidance: float | None,
    negative_prompt: str | None,
    carry: float | None,
    text_length: int | None,
    out: Path | None,
    fps: float | None,
    trace_file: Path | None,
    plot_file: Path | None,
    map_file: Path | None,
    in_flight: int,
    ray: bool,
    replicas: tuple[int, int] | None,
    backend: str | None,
    threads: int | None,
    low_memory: bool,
    vae_tiling: int | None,
    as_json: bool,
) -> None:
    """Make one picture or one clip, or all those of a file of prompts."""
    asked: dict[str, Any] = {
        "seed": seed,
        "steps": steps,
        "schedule": join_schedule(schedule, reuse) or None,
        "budget": budget,
        "height": height,
        "width": width,
        "guidance": guidance,
        "negative_prompt": negative_prompt,
        "carry": carry,
        "text_length": text_length,
        "frames": frames,
    }
    if (prompt is None) == (prompts is None):
        raise UsageError("give a prompt, or a file of them with --prompts")
    if prompts is not None:
        if trace_file or plot_file or map_file:
            raise UsageError("--trace, --plot and --map are for one picture; results.jsonl says how many came about")
        if replicas and not ray:
            raise UsageError("--replicas is for --ray")
        if low_memory and ray:
            raise UsageError("--ray keeps text encoders and levels in memory; leave --low-memory out")
        generate_many(
            bundle,
            prompts,
            out or Path("out"),
            asked,
            fps=fps,
            backend=backend,
            threads=threads,
            low_memory=low_memory,
            vae_tiling=vae_tiling,
            in_flight=in_flight,
            ray=ray,
            replicas=replicas,
            as_json=as_json,
        )
        return
    assert prompt is not None
    for name in ("in_flight", "ray", "replicas"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name.replace('_', '-')} is for many pictures; give a file of them with --prompts")
    # before the work, not after it: whatever would keep the results from being written
    for path in filter(None, (plot_file, map_file)):
        check_type(path, plot_types())
    opened = Bundle.open(bundle)
    decoder = opened.manifest.decoder
    clip = decoder.kind == "video"
    if fps and not clip:
        raise UsageError("this model makes pictures; --fps is for clips")
    out = out or Path("out.mp4" if clip else "out.png")
    numbered = clip and "%" in out.name
    if numbered or not clip:
        check_type(out, PICTURES)
    else:
        check_clip_type(out)
    first = frame_files(out, 1) if numbered else [out]
    check_outputs([path for path in (*first, trace_file, plot_file, map_file) if path])
    pipeline = Pipeline(opened, open_backend(backend, opened, threads, low_memory=low_memory), vae_tiling=vae_tiling)
    if map_file and len(pipeline.bundle.manifest.levels) < 2:
        raise UsageError("a map shows what coarse levels would miss, and the bundle has none")
    with _progress_bar() as bar:
        task = bar.add_task("opening", total=None)

        def on_step(done: Progress) -> None:
            bar.update(task, completed=done.step + 1, total=done.steps, description=_doing(done.records[0]))

        def on_frame(done: int, frames: int) -> None:
            bar.update(task, completed=done, total=frames, description="decoding")

        result = pipeline(prompt, **asked, on_step=on_step, on_frame=on_frame)
    if isinstance(decoder, VideoDecoderInfo) and not numbered:
        save_frames(result.frames, out, fps or decoder.frames_per_second)
    else:
        files = frame_files(out, len(result.frames)) if numbered else [out]
        for file, picture in zip(files, result.frames, strict=True):
            with whole(file) as part:
                save_picture(picture, part)
    if trace_file:
        with whole(trace_file) as part:
            part.write_text(result.trace.to_json() + "\n", encoding="utf-8")
    if plot_file:
        with whole(plot_file) as part:
            plot_schedule(result.trace, part)
    if map_file:
        complexity = result.trace.complexity
        assert complexity is not None
        with whole(map_file) as part:
            plot_complexity(result.frames, complexity, part)
    if as_json:
        click.echo(strict_json.dump({"out": str(out), "seed": seed, **result.trace.summary()}))
    else:
        if budget is not None:
            spent = sum((result.trace.total_milliseconds(), result.trace.encode_milliseconds,
                         result.trace.decode_milliseconds)) / 1000  # fmt: skip
            say(f"budget {budget:g} s, used {spent:.2f} s; schedule {result.trace.schedule['text']}")
        say(f"{out}: {_steps_line(result.trace)}, backend {pipeline.backend}")


def _doing(record: StepRecord) -> str:
    what = "predicted" if record.level is None else f"level {record.level}"
    return what if record.scale == 1 or record.size is None else f"{what}, {record.size[0]}×{record.size[1]}"


def _steps_line(trace: Trace) -> str:
    counts = Counter((record.scale, record.size, record.level) for record in trace.steps)
    steps = []
    for (scale, size, level), count in sorted(counts.items(), key=lambda one: (one[0][0], one[0][2] or math.inf)):
        small = f" at {size[0]}×{size[1]}" if size and scale < 1 else ""
        steps.append(f"{count} {'predicted' if level is None else f'at level {level}'}{small}")
    return f"{len(trace.steps)} steps ({' + '.join(steps)}) in {trace.total_milliseconds() / 1000:.1f} s"


def _progress_bar() -> ProgressBar:
    columns = (TextColumn("{task.description:>18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = terminal(stderr=True)
    return ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal)
