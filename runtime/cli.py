"""ddit-run: make pictures with a bundle, look into it, check it, measure it."""

import dataclasses
import re
from collections.abc import Set
from pathlib import Path

import click
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from ddit.runtime import strict_json
from ddit.runtime.backends.artifacts import EngineStore
from ddit.runtime.backends.registry import kinds, open_backend
from ddit.runtime.bundle import MANIFEST, Bundle
from ddit.runtime.console import DditGroup, red, say, set_up_logging, terminal
from ddit.runtime.denoise import Progress
from ddit.runtime.errors import BundleError, UsageError
from ddit.runtime.files import check_outputs, whole
from ddit.runtime.pipeline import Pipeline
from ddit.runtime.policies import Dynamic
from ddit.runtime.request import Request
from ddit.runtime.tools.inspect import show, tau_of
from ddit.runtime.tools.plots import plot_complexity, plot_schedule, plot_types
from ddit.runtime.trace import Trace

BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
JSON = click.option("--json", "as_json", is_flag=True, help="Report as JSON on stdout.")


PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"}  # which every Pillow writes as they are
LONGEST_LIST = 16_000_000  # characters of a file of prompts


class BackendOption(click.Option):
    """An option whose help lists the backends that are registered when somebody asks."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """The option and its help."""
        known = "; ".join(f"{kind.name}: {kind.description}" for kind in kinds())
        self.help = f"{known}; or an ONNX Runtime execution provider by name.  [default: the fastest here]"
        return super().get_help_record(ctx)


BACKEND = click.option("--backend", cls=BackendOption)
THREADS = click.option("--threads", type=click.IntRange(1), help="Threads of one graph.  [default: all cores]")


class Seconds(click.ParamType):  # type: ignore[type-arg]
    """A time."""

    name = "time"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """``"1.5s"``, ``"1500ms"`` and ``"1.5"`` → 1.5."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)(ms|s|)", value.strip())
        if match is None or not float(match[1]):
            self.fail(f"{value!r}: give a time, as in 1.5s or 800ms", param, ctx)
        return float(match[1]) / (1000 if match[2] == "ms" else 1)


@click.group(cls=DditGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ddit")
@click.option("-v", "--verbose", count=True, help="Say more; twice for everything.")
def main(verbose: int) -> None:
    """Run a bundle that ddit-export made: one prompt, one picture, the patch size chosen anew at every step."""
    set_up_logging(verbose)


@main.command()
@BUNDLE
@click.argument("prompt")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--steps", type=int, help="Denoising steps.  [default: the bundle's]")
@click.option(
    "--schedule",
    default="dynamic",
    show_default=True,
    help="native, fixed:8x10,4x20,2x20 or dynamic[:tau=…,rho=…,warmup=…,hold=…,coarsest=…,absolute=…].",
)
@click.option(
    "--budget", type=Seconds(), help="Seconds for the picture, as in 1.5s or 800ms; chooses the schedule itself."
)
@click.option("--height", type=int, help="Pixels.  [default: the profile's optimum]")
@click.option("--width", type=int, help="Pixels.  [default: the profile's optimum]")
@click.option("--guidance", type=float, help="Guidance scale.  [default: the bundle's]")
@click.option(
    "--carry", type=float, help="Share of native detail that coarse steps take over.  [default: the bundle's]"
)
@click.option("--text-length", type=click.IntRange(1), help="Tokens of the prompt.  [default: the bundle's]")
@click.option("--out", type=click.Path(path_type=Path), default="out.png", show_default=True, help="Picture to write.")
@click.option("--trace", "trace_file", type=click.Path(path_type=Path), help="Write what every step did as JSON.")
@click.option(
    "--plot", "plot_file", type=click.Path(path_type=Path), help="Draw levels and statistics (.png, .svg, .pdf)."
)
@click.option("--map", "map_file", type=click.Path(path_type=Path), help="Draw where and when there was detail.")
@BACKEND
@THREADS
@JSON
def generate(
    bundle: Path,
    prompt: str,
    seed: int,
    steps: int | None,
    schedule: str,
    budget: float | None,
    height: int | None,
    width: int | None,
    guidance: float | None,
    carry: float | None,
    text_length: int | None,
    out: Path,
    trace_file: Path | None,
    plot_file: Path | None,
    map_file: Path | None,
    backend: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Make one picture."""
    # before the work, not after it: whatever would keep the results from being written
    check_outputs([path for path in (out, trace_file, plot_file, map_file) if path])
    _check_type(out, PICTURES)
    for path in filter(None, (plot_file, map_file)):
        _check_type(path, plot_types())
    pipeline = Pipeline.open(bundle, backend=backend, threads=threads)
    if map_file and len(pipeline.bundle.manifest.levels) < 2:
        raise UsageError("a map shows what coarse levels would miss, and the bundle has none")
    with _progress_bar() as bar:
        task = bar.add_task("opening", total=None)

        def on_step(done: Progress) -> None:
            bar.update(task, completed=done.step + 1, total=done.steps, description=f"level {done.levels[0]}")

        result = pipeline(
            prompt,
            seed=seed,
            steps=steps,
            schedule=schedule,
            budget=budget,
            height=height,
            width=width,
            guidance=guidance,
            carry=carry,
            text_length=text_length,
            on_step=on_step,
        )
    with whole(out) as part:
        _save(result.image, part)
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
            plot_complexity(result.image, complexity, part)
    if as_json:
        click.echo(strict_json.dump({"out": str(out), "seed": seed, **result.trace.summary()}))
    else:
        if budget is not None:
            spent = sum((result.trace.total_milliseconds(), result.trace.encode_milliseconds,
                         result.trace.decode_milliseconds)) / 1000  # fmt: skip
            say(f"budget {budget:g} s, used {spent:.2f} s; schedule {result.trace.schedule['text']}")
        say(f"{out}: {_steps_line(result.trace)}, backend {pipeline.backend}")


def _steps_line(trace: Trace) -> str:
    steps = " + ".join(f"{count} at level {level}" for level, count in trace.steps_per_level().items())
    return f"{len(trace.steps)} steps ({steps}) in {trace.total_milliseconds() / 1000:.1f} s"


@main.command()
@BUNDLE
@JSON
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what a bundle holds.

    Levels, tensors, shapes, profile, adapter state, parity, sizes, engines.
    """
    opened = Bundle.open(bundle)
    manifest, engines = opened.manifest, EngineStore(opened).engines()
    if as_json:
        infos = [{"key": engine.info.key, **engine.info.model_dump(mode="json")} for engine in engines]
        click.echo(strict_json.dump({**manifest.model_dump(mode="json"), "plans": infos}, indent=2))
        return
    show(bundle, manifest, engines)


@main.command()
@BUNDLE
@BACKEND
@THREADS
@JSON
def verify(bundle: Path, backend: str | None, threads: int | None, as_json: bool) -> None:
    """Check a bundle on this machine.

    Compares every file with its hash, loads every tokenizer and graph, and reproduces the exporter's parity values.
    """
    from ddit.runtime.tools.verify import check_names, check_tokenizers, verify_graphs

    opened = Bundle.open(bundle)
    unlisted = check_names(opened)
    files = list(opened.verify_files())
    engines = EngineStore(opened).engines()
    for engine in engines:
        engine.verify()
    check_tokenizers(opened)
    running = open_backend(backend, opened, threads)
    checks = list(verify_graphs(running))
    unchecked = sorted(opened.manifest.graphs.keys() - {check.graph for check in checks})
    failed = [check for check in checks if not check.passed]
    if as_json:
        report = {
            "files": len(files),
            "plans": len(engines),
            "backend": running.name,
            "checks": [{**dataclasses.asdict(check), "passed": check.passed} for check in checks],
            "without_reference": unchecked,
            "unlisted": unlisted,
            "passed": not failed,
        }
        click.echo(strict_json.dump(report, indent=2))
    else:
        table = Table("graph", "case", "tensor", "relative error", "allowed", "")
        for check in checks:
            verdict = "ok" if check.passed else red("FAILED")
            table.add_row(
                check.graph, str(check.case), check.tensor, f"{check.error:.1e}", f"{check.tolerance:g}", verdict
            )
        terminal().print(f"{len(files) + len(engines)} files have their recorded hash; backend: {running}")
        terminal().print(table)
        for name in unlisted:
            say(f"warning: {name} is not a file of the bundle's: its manifest does not list it")
        for name in unchecked:
            say(f"warning: {name} was not compared: no reference values of it fit the engines, or it has none")
    if failed:
        worst = max(failed, key=lambda check: check.error)
        raise BundleError(
            f"{bundle} does not reproduce its parity values: {worst.graph}.{worst.tensor} is off by {worst.error:.1e} "
            f"(allowed {worst.tolerance:g}); export it again, or report it with this machine's onnxruntime version"
        )


@main.command()
@BUNDLE
@click.option("--height", type=int, help="Pixels.  [default: the profile's optimum]")
@click.option("--width", type=int, help="Pixels.  [default: the profile's optimum]")
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
    height, width = manifest.picture_size(height=height, width=width)
    manifest.sizes(height=height, width=width, text=manifest.text_length)
    with opened.unchanged():  # every level is measured in a process that opens the bundle anew
        measured = measure(Job(bundle, chosen, threads, height, width), manifest, repeat)
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


@main.command()
@BUNDLE
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    required=True,
    help="File with a prompt a line; half of them are kept to test the result.",
)
@click.option("--speedup", type=click.FloatRange(1, min_open=True), help="Find the τ that is so many times faster.")
@click.option(
    "--quality",
    type=click.FloatRange(0, 1, min_open=True),
    help="Find the fastest τ with such a mean SSIM to native.",
)
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: the bundle's]")
@click.option("--height", type=int, help="Pixels.  [default: the profile's optimum]")
@click.option("--width", type=int, help="Pixels.  [default: the profile's optimum]")
@click.option(
    "--schedule",
    default="dynamic",
    show_default=True,
    help="The schedule whose τ is wanted, as in dynamic:rho=0.8,coarsest=4.",
)
@click.option("--absolute", is_flag=True, help="An absolute τ, as in the paper, not one relative to smooth pictures.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw the curve (.png, .svg, .pdf).")
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
    schedule: str,
    absolute: bool,
    plot_file: Path | None,
    dry_run: bool,
    backend: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Find the dynamic schedule's τ and keep it.

    For a number of steps, a size and the backend, in the bundle.

    --speedup 2 unless --quality is given.
    """
    from ddit.runtime.tools import calibrate as calibration

    if speedup is not None and quality is not None:
        raise UsageError("give --speedup or --quality, not both: one τ cannot be chosen by two measures")
    if plot_file:
        check_outputs([plot_file])
        _check_type(plot_file, plot_types())
    target = calibration.Target(speedup=2.0 if speedup is None and quality is None else speedup, similarity=quality)
    texts = _read_prompts(prompts)
    pipeline = Pipeline.open(bundle, backend=backend, threads=threads)
    if not dry_run:
        check_outputs([bundle / MANIFEST])  # now, not after hours
    manifest = pipeline.bundle.manifest
    height, width = manifest.picture_size(height=height, width=width)
    size = {"steps": steps or manifest.sampler.steps, "height": height, "width": width}
    for text in texts:
        pipeline.resolve([Request(text, schedule="native", **size)])  # type: ignore[arg-type]
    calibration.halves(texts)
    wanted = pipeline.policy(schedule, **size)
    if not isinstance(wanted, Dynamic):
        raise UsageError(f"{schedule} has no τ; only dynamic schedules are calibrated")
    calibrator = calibration.Calibrator(pipeline, dataclasses.replace(wanted, smooth=None), **size)
    found = calibration.search(calibrator, texts, target, say, relative=not absolute)
    best = found.best(target)
    kept = calibration.calibration(calibrator, found, best)
    if not dry_run:
        pipeline.bundle.calibrate(kept)
    if plot_file:
        with whole(plot_file) as part:
            calibration.plot(found, best, part)
    if as_json:
        click.echo(strict_json.dump({**kept.model_dump(exclude={"curve"}), **dataclasses.asdict(found)}, indent=2))
        return
    table = Table("prompts", "number", "speed-up", "spread", "SSIM to native", "coarse steps")
    assert found.held_out is not None
    for name, point in (("τ was chosen on", best), ("others", found.held_out)):
        table.add_row(name, str(len(point.samples)), f"{point.speedup:.2f}×", *calibration.spread(point))
    terminal().print(table)
    where = "not kept (--dry-run)" if dry_run else f"kept in {bundle / 'bundle.json'}"
    say(f"{tau_of(kept)} for {kept.steps} steps at {kept.height}×{kept.width}, {where}")


def _read_prompts(path: Path) -> list[str]:
    """The lines of a file, or of a pipe, that are not empty."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST_LIST + 1)
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{path} cannot be read; give a text file with a prompt a line") from None
    if len(text) > LONGEST_LIST:
        raise UsageError(f"{path} has more than {LONGEST_LIST} characters; give a text file with a prompt a line")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _progress_bar() -> ProgressBar:
    columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = terminal(stderr=True)
    return ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal)


def _save(picture: Image.Image, path: Path) -> None:
    try:
        picture.save(path)
    except ValueError as error:  # WebP and JPEG have a largest size
        raise UsageError(f"{path.suffix} cannot hold the picture: {error}; choose --out with .png") from None


def _check_type(path: Path, known: Set[str]) -> None:
    if path.suffix.lower() not in known:
        raise UsageError(f"{path} has an unknown file type; name it {path.with_suffix('.png')}, for instance")


if __name__ == "__main__":
    main()
