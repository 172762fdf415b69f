"""Measure a backend against the CPU: agreement, pictures, milliseconds per level, the cost of a switch, memory.

    python scripts/benchmark.py demo.bundle --backend tensorrt --size 256x256 --size 192x320 --out docs/measured/h200.md

Writes a Markdown report and prints it. Every figure is a median; both sides of a comparison are measured in turn, in
one process. Needs the runtime only, with ONNX Runtime for the CPU's side.
"""

import platform
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from ddit.runtime import Pipeline
from ddit.runtime.backends.artifacts import EngineStore
from ddit.runtime.backends.base import Array
from ddit.runtime.bundle import Manifest
from ddit.runtime.conditioning.positions import level_tables
from ddit.runtime.console import DditCommand, say, set_up_logging
from ddit.runtime.errors import UsageError
from ddit.runtime.policies import Dynamic, Policy
from ddit.runtime.shapes import Size
from ddit.runtime.tools.bench import time_steps
from ddit.runtime.tools.samples import sample_inputs
from ddit.runtime.tools.verify import relative_error
from ddit.runtime.trace import Trace

PROMPT, SEED = "a red circle on a striped background", 7
Table = list[list[str]]


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("path", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--backend", required=True, help="The backend to measure: tensorrt, cuda, or a provider's name.")
@click.option("--size", "sizes", multiple=True, default=("256x256",), show_default=True, help="HEIGHTxWIDTH in pixels.")
@click.option("--prompt", "prompts", multiple=True, default=(PROMPT,), show_default=True, help="Of a picture.")
@click.option("--steps", default=50, show_default=True, help="Denoising steps of the pictures.")
@click.option("--repeat", default=100, show_default=True, help="Steps of every timing.")
@click.option("--schedule", default="dynamic", show_default=True, help="Schedule of the pictures.")
@click.option("--reference", type=click.Path(path_type=Path), help="Bundle of the CPU's side.  [default: BUNDLE]")
@click.option("--no-reference", is_flag=True, help="Leave the CPU's side out: for models that a CPU cannot run.")
@click.option("--out", type=click.Path(path_type=Path), help="Markdown file to write.")
def main(
    path: Path,
    backend: str,
    sizes: tuple[str, ...],
    prompts: tuple[str, ...],
    steps: int,
    repeat: int,
    schedule: str,
    reference: Path | None,
    no_reference: bool,
    out: Path | None,
) -> None:
    """Measure a backend against the CPU."""
    set_up_logging(0)
    shapes = [read_size(size) for size in sizes]
    measured = Pipeline.open(path, backend=backend)
    opened = [*openings(measured, *shapes[0])]  # before anything else has opened an engine
    parts = [f"# {measured.backend}\n\n" + "\n".join(f"* {line}" for line in facts(measured))]
    if not no_reference:
        on_cpu = Pipeline.open(reference or path, backend="cpu")
        of = f", {on_cpu.bundle.manifest.dtype}" if reference else ""
        parts.append(section(f"Agreement with the CPU{of}", agreement(on_cpu, measured, shapes)))
        parts.append(section("Pictures", pictures(on_cpu, measured, shapes, prompts, steps, schedule)))
    for height, width in shapes:
        parts.append(section(f"Steps at {height}×{width}", timings(measured, height, width, repeat)))
    parts.append(section("Memory", memory(measured, opened)))
    report = "\n\n".join(parts) + "\n"
    click.echo(report)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report, encoding="utf-8")
        say(f"written to {out}")


def read_size(text: str) -> tuple[int, int]:
    """``"256x192"`` → (256, 192)."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise UsageError(f"cannot read the size {text!r}; write HEIGHTxWIDTH, as in 256x256")
    return int(height), int(width)


def facts(pipeline: Pipeline) -> Iterator[str]:
    """What made the numbers."""
    manifest = pipeline.bundle.manifest
    yield f"bundle: {manifest.model.id}, {manifest.dtype}, opset {manifest.opset}, levels {manifest.patches}"
    packages = versions("ddit", "tensorrt", "onnxruntime-gpu", "onnxruntime", "cuda-bindings", "numpy")
    yield f"versions: Python {platform.python_version()}, {', '.join(packages)}"
    yield f"command: `{shlex.join(['python', *sys.argv])}`"


def versions(*packages: str) -> Iterator[str]:
    """Those of the packages that are installed, as in ``"numpy 2.2.0"``."""
    for name in packages:
        with suppress(PackageNotFoundError):
            yield f"{name} {version(name)}"


# ---- agreement ----


def agreement(reference: Pipeline, measured: Pipeline, shapes: Sequence[tuple[int, int]]) -> Table:
    """Relative L2 error of the outputs on the same random inputs, at every size, for the graphs that both have."""
    table = [["graph", *(f"{height}×{width}" for height, width in shapes)]]
    manifest, others = measured.bundle.manifest, reference.bundle.manifest.graphs
    for name, info in manifest.graphs.items():
        if name not in others or others[name].inputs != info.inputs:
            continue
        row = [name]
        for height, width in shapes:
            sizes = manifest.sizes(Size(height, width), text=manifest.text_length)
            inputs = inputs_of(manifest, name, sizes)
            expected = reference.backend.engine(name).run(inputs)
            actual = measured.backend.engine(name).run(inputs)
            row.append(f"{max(relative_error(actual[key], value) for key, value in expected.items()):.1e}")
        table.append(row)
    return table


def inputs_of(manifest: Manifest, name: str, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Seeded inputs of a graph; a level's with its real rotary tables."""
    patch = next((level.patch for level in manifest.levels if level.graph == name), None)
    tables = level_tables(manifest.positions, manifest.latent, manifest.native, patch, sizes) if patch else None
    return sample_inputs(manifest.graphs[name].inputs, sizes, tables=tables)


def pictures(
    reference: Pipeline,
    measured: Pipeline,
    shapes: Sequence[tuple[int, int]],
    prompts: Sequence[str],
    steps: int,
    text: str,
) -> Table:
    """The same pictures from both: levels chosen alike, how narrowly, PSNR, milliseconds of all steps."""
    columns = "size|prompt|steps per level|chosen alike|σ apart: median, most|closest to τ|PSNR|CPU ms|ms"
    table = [columns.split("|")]
    for height, width in shapes:
        schedule = reference.policy(text, steps=steps, height=height, width=width)
        options: dict[str, Any] = {"seed": SEED, "steps": steps, "schedule": schedule, "height": height, "width": width}
        for pipeline in (reference, measured):
            pipeline(prompts[0], **options)  # prepares the engines
        for prompt in prompts:
            expected, actual = reference(prompt, **options), measured(prompt, **options)
            same = sum(a == b for a, b in zip(actual.trace.levels, expected.trace.levels, strict=True))
            apart, closest = statistics_apart(expected.trace, actual.trace), closest_call(schedule, expected.trace)
            quality = psnr(np.asarray(actual.image), np.asarray(expected.image))
            counts = ", ".join(f"{count} at {level}" for level, count in actual.trace.steps_per_level().items())
            times = (f"{result.trace.total_milliseconds():.1f}" for result in (expected, actual))
            row = [f"{height}×{width}", prompt, counts, f"{same} of {steps}", apart, closest, f"{quality:.1f} dB"]
            table.append([*row, *times])
    return table


def statistics_apart(expected: Trace, actual: Trace) -> str:
    """How far the measured σ_p lies from the CPU's: the median over steps and patches, and the most.

    Up to the first step that was chosen unlike; after it the latents are different ones.
    """
    apart = []
    for mine, theirs in zip(actual.steps, expected.steps, strict=True):
        if mine.level != theirs.level:
            break
        for patch in mine.statistic.keys() & theirs.statistic.keys():
            apart.append(abs(mine.statistic[patch] / theirs.statistic[patch] - 1))
    return f"{statistics.median(apart):.1%}, {max(apart):.1%}" if apart else "–"


def closest_call(schedule: Policy, trace: Trace) -> str:
    """How near σ_p came to its threshold where it decided a level."""
    if not isinstance(schedule, Dynamic):
        return "–"
    distances = [
        abs(trace.steps[step - 1].statistic[patch] / schedule.threshold(patch, step - 1) - 1)
        for step in range(schedule.warmup, len(trace.steps))
        if schedule.judges([level for level in trace.levels[:step] if level is not None])
        for patch in schedule.coarse
    ]
    return f"{min(distances):.2%}" if distances else "–"


def psnr(picture: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal pictures."""
    error = np.square(picture.astype(np.float64) - other).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


# ---- time ----


def timings(pipeline: Pipeline, height: int, width: int, repeat: int) -> Table:
    """Median milliseconds of a step at every level, and what a switch between two adds to their own times."""
    manifest = pipeline.bundle.manifest
    patterns = [(patch,) for patch in manifest.patches] + [(manifest.native, patch) for patch in manifest.coarse]
    measured = time_steps(pipeline.backend, patterns, size=Size(height, width), repeat=repeat)
    times = {pattern: pattern_milliseconds(pattern, values) for pattern, values in measured.items()}
    native = times[(manifest.native,)]
    table = [["steps", "ms a step", "against native", "ms a switch"]]
    for pattern, value in times.items():
        if len(pattern) == 1:
            table.append([f"level {pattern[0]}", f"{value:.3f}", f"{native / value:.2f}×", "–"])
        else:
            own = statistics.mean(times[(patch,)] for patch in pattern)
            table.append([f"{', '.join(map(str, pattern))} in turn", f"{value:.3f}", "–", f"{value - own:+.3f}"])
    return table


def pattern_milliseconds(pattern: tuple[int, ...], values: Sequence[float]) -> float:
    """Milliseconds of a step: the mean over the pattern's levels of each one's median."""
    return statistics.mean(statistics.median(values[place :: len(pattern)]) for place in range(len(pattern)))


# ---- memory ----


def openings(pipeline: Pipeline, height: int, width: int) -> Iterator[list[str]]:
    """What every level adds to the GPU's memory when it is opened, and by its first run; the native one comes first.

    ONNX Runtime has the weights on the GPU when a session is open, TensorRT loads an engine for the first run.
    """
    manifest, backend = pipeline.bundle.manifest, pipeline.backend
    sizes = manifest.sizes(Size(height, width), text=manifest.text_length)
    used = [backend.memory_used()]
    for patch in manifest.patches:
        graph = manifest.level(patch).graph
        engine = backend.engine(graph)
        used.append(backend.memory_used())
        engine.run(inputs_of(manifest, graph, sizes))
        used.append(backend.memory_used())
        for what, before, after in zip(("opening", "the first run of"), used[-3:-1], used[-2:], strict=True):
            if before is not None and after is not None:
                yield [f"added by {what} level {patch}", f"{(after - before) / 1e6:,.1f}"]


def memory(pipeline: Pipeline, opened: Table) -> Table:
    """What the backend holds on the GPU, and what sharing saves."""
    table = [["", "MB"], *opened]
    used = pipeline.backend.memory_used()
    table.append(["held on the GPU after all of this", "–" if used is None else f"{used / 1e6:,.0f}"])
    manifest = pipeline.bundle.manifest
    levels = [manifest.level(patch) for patch in manifest.patches]
    stored = [engine.info for engine in EngineStore(pipeline.bundle).engines()]
    if built := [info for info in stored if info.backend == pipeline.backend.name]:
        scratch = {level.patch: max(info.scratch for info in built if info.graph == level.graph) for level in levels}
        table += [[f"scratch memory of level {patch}", f"{value / 1e6:,.1f}"] for patch, value in scratch.items()]
        table.append(["scratch memory of the levels, shared: their maximum", f"{max(scratch.values()) / 1e6:,.1f}"])
        table.append(["scratch memory of the levels, if it were not: their sum", f"{sum(scratch.values()) / 1e6:,.1f}"])
    else:
        files = [set(pipeline.bundle.graph(level.graph).weights) for level in levels]
        size = {name: manifest.files[name].size for names in files for name in names}
        table.append(["files of the levels' weights, the trunk once", f"{sum(size.values()) / 1e6:,.1f}"])
        table.append(
            [
                "files of the levels' weights, if each level had its own trunk",
                f"{sum(size[n] for names in files for n in names) / 1e6:,.1f}",
            ]
        )
    return table


def section(title: str, table: Table) -> str:
    """A heading and a Markdown table."""
    head, *rows = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([f"## {title}\n", head, "|" + "---|" * len(table[0]), *rows])


if __name__ == "__main__":
    main()
