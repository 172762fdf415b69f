"""Time a bundle beside the diffusers model that it was exported from, on one GPU: steps, kernels, whole runs.

    python scripts/random_model.py tests/data/flux1-dev runs/random --double-blocks 1 --single-blocks 2
    ddit-export flux --model runs/random --out random.bundle
    python scripts/compare_diffusers.py runs/random random.bundle --size 1024x1024

For every level diffusers runs its transformer on as many tokens as the level has: on a picture that is smaller by the
level's factor. It runs as it comes (eager), with its blocks compiled by torch, and the latter as one CUDA graph, which
is the fastest that diffusers' users have. The bundle runs whole denoising steps of the runtime, the step graph and what
the host does included. Every figure is a median; all kinds take turns in one process.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import torch
from diffusers import DiffusionPipeline
from torch import nn

from benchmark import Table, read_size, section, versions
from command_line.options import option, options
from ddit.exporter.components import TORCH_DTYPES
from ddit.runtime import Pipeline
from ddit.runtime.console import DditCommand, say, set_up_logging
from ddit.runtime.errors import UsageError
from ddit.runtime.shapes import Size
from ddit.runtime.tools.bench import time_steps

PROMPT, SEED = "a red circle on a striped background", 7
WARM_UP = 3
TIMED = 5  # calls of one kind before the next kind has its turn
GRAPHS = 64  # that torch may compile of one block, for every size its own
Call = Callable[[], Any]
cuda: Any = torch.cuda  # torch has no types for some of it
cudnn: Any = torch.backends.cudnn


@dataclass(frozen=True, kw_only=True)
class Config:
    """What was asked for."""

    size: str = option(default="1024x1024", help="HEIGHTxWIDTH in pixels.")
    frames: int = option(type=click.IntRange(1), default=1, help="Of a clip.")
    backends: tuple[str, ...] = option(
        "--backend", multiple=True, default=("cuda",), help="The runtime's backend; again for more in the same run."
    )
    rounds: int = option(type=click.IntRange(1), default=4, help=f"Turns of {TIMED} calls of every kind.")
    kernels: int = option(type=click.IntRange(0), default=0, help="GPU kernels of a step to list, the longest first.")
    schedules: tuple[str, ...] = option(
        "--schedule", multiple=True, default=(), show_default=False, help="Whole runs of it, too; again for more."
    )
    steps: int = option(type=click.IntRange(1), default=50, help="Steps of whole runs.")
    eager: bool = option("--eager/--no-eager", default=True, show_default=False, help="Measure diffusers as it comes.")
    out: Path | None = option(type=click.Path(path_type=Path), help="Markdown file to write.")


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@options(Config)
def main(model: Path, bundle: Path, **given: Any) -> None:
    """Time BUNDLE beside MODEL, the diffusers folder that it was exported from."""
    set_up_logging(0)
    config = Config(**given)
    if not torch.cuda.is_available():
        raise UsageError("torch finds no GPU here; this comparison needs one")
    if not (model / "model_index.json").is_file():
        raise UsageError(f"{model} is no diffusers folder; give the one that the bundle was exported from")
    torch._dynamo.config.recompile_limit = GRAPHS
    ours = [Pipeline.open(bundle, backend=backend) for backend in dict.fromkeys(config.backends)]
    manifest = ours[0].bundle.manifest
    theirs = DiffusionPipeline.from_pretrained(model, torch_dtype=TORCH_DTYPES[manifest.dtype]).to("cuda")
    theirs.set_progress_bar_config(disable=True)
    size = Size(*read_size(config.size), config.frames if config.frames > 1 else None)
    title = f"# {manifest.model.id} on {torch.cuda.get_device_name()}"
    parts = [title + "\n\n" + "\n".join(f"* {line}" for line in facts())]
    with torch.no_grad():
        for part in report(ours, theirs, size, config):
            click.echo(part + "\n")
            parts.append(part)
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        say(f"written to {config.out}")


def facts() -> Iterator[str]:
    """What made the numbers."""
    yield "versions: " + ", ".join(versions("ddit", "diffusers", "torch", "onnxruntime-gpu", "cuda-bindings"))
    yield f"cuDNN {cudnn.version()}"


def report(ours: Sequence[Pipeline], theirs: Any, size: Size, config: Config) -> Iterator[str]:
    """The sections, each as soon as it is measured."""
    manifest = ours[0].bundle.manifest
    given = {patch: transformer_inputs(theirs, shrunk(size, patch // manifest.native)) for patch in manifest.patches}
    runs = {
        f"{name_of(one)}, `{schedule}`": our_run(one, schedule, size, config.steps)
        for one in ours
        for schedule in config.schedules
    }
    run, warm_up = their_run(theirs, size, config.steps), their_run(theirs, size, 2)
    whole: dict[str, float] = {}
    steps: dict[str, dict[int, float]] = {}
    if config.eager:
        steps["diffusers"] = {patch: median(step_of(theirs.transformer, x), config) for patch, x in given.items()}
        if runs:
            whole["diffusers"] = seconds(run, warm_up)
    theirs.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    steps["diffusers, compiled"] = {patch: median(step_of(theirs.transformer, x), config) for patch, x in given.items()}
    if runs:
        whole["diffusers, compiled"] = seconds(run, warm_up)
    replays = {patch: captured(theirs.transformer, x) for patch, x in given.items()}
    graphs: dict[int, list[float]] = {patch: [] for patch in given}
    own: dict[str, dict[int, list[float]]] = {name_of(one): {patch: [] for patch in given} for one in ours}
    for _ in range(config.rounds):
        for patch, replay in replays.items():
            graphs[patch] += milliseconds(replay, TIMED)
            for one in ours:
                times = time_steps(one.backend, [(patch,)], size=size, repeat=TIMED, rounds=1)[(patch,)]
                own[name_of(one)][patch] += times
    steps["diffusers, compiled, as a CUDA graph"] = {patch: statistics.median(times) for patch, times in graphs.items()}
    for name, found in own.items():
        steps[name] = {patch: statistics.median(times) for patch, times in found.items()}
    yield section(f"Steps at {config.size}" + (f"×{size.frames}" if size.frames else ""), step_table(steps, list(own)))
    del replays
    if runs:
        whole |= {name: seconds(call, call) for name, call in runs.items()}
        yield section(f"Runs of {config.steps} steps", run_table(whole))
    if config.kernels:
        for one in ours:
            for patch in given:
                title = f"Kernels of a step at level {patch}, {name_of(one)}"
                yield section(title, kernel_table(one, patch, size, config.kernels))


def name_of(pipeline: Pipeline) -> str:
    """What the tables call a pipeline of ours."""
    return f"ddit, `{pipeline.backend.name}`"


def shrunk(size: Size, factor: int) -> Size:
    """The size whose native tokens are as many as a level's."""
    return Size(size.height // factor, size.width // factor, size.frames)


def transformer_inputs(pipeline: Any, size: Size) -> list[dict[str, Any]]:
    """What the pipeline gives its transformer in the calls of one step, at a size."""

    def keep(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        kept.append({name: each.clone() if torch.is_tensor(each) else each for name, each in given.items()})

    kept: list[dict[str, Any]] = []
    hook = pipeline.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        their_run(pipeline, size, 1, output_type="latent")()
    finally:
        hook.remove()
    return kept


def step_of(transformer: nn.Module, given: Sequence[Mapping[str, Any]]) -> Call:
    """The transformer's calls of one step."""
    return lambda: [transformer(**each) for each in given]


def their_run(pipeline: Any, size: Size, steps: int, **more: Any) -> Call:
    """A whole run of diffusers, decoding included."""
    if size.frames:
        more["num_frames"] = size.frames
    return lambda: pipeline(PROMPT, height=size.height, width=size.width, num_inference_steps=steps, **more)


def our_run(pipeline: Pipeline, schedule: str, size: Size, steps: int) -> Call:
    """The same of the runtime."""
    where: dict[str, Any] = size.by_name()
    return lambda: pipeline(PROMPT, seed=SEED, steps=steps, schedule=schedule, **where)


def captured(transformer: nn.Module, given: Sequence[Mapping[str, Any]]) -> Call:
    """The transformer's calls of one step as one CUDA graph.

    Its position embedding is computed beforehand: diffusers computes it on the host, which cannot be captured.
    """
    embed = getattr(transformer, "pos_embed", None)
    if embed is not None:
        transformer.pos_embed = Constant(embed(torch.cat([given[0]["txt_ids"], given[0]["img_ids"]])))
    call = step_of(transformer, given)
    stream = cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    if embed is not None:
        transformer.pos_embed = embed
    return graph.replay


class Constant(nn.Module):
    """Gives the same, whatever it is asked."""

    def __init__(self, value: Any):
        super().__init__()
        self._value = value

    def forward(self, *_: Any) -> Any:
        """The value."""
        return self._value


def median(call: Call, config: Config) -> float:
    """Milliseconds of a call on the GPU."""
    for _ in range(WARM_UP):
        call()
    return statistics.median(milliseconds(call, config.rounds * TIMED))


def milliseconds(call: Call, repeat: int) -> list[float]:
    """Of every call, by the GPU's own events."""
    times = []
    for _ in range(repeat):
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def seconds(call: Call, warm_up: Call) -> float:
    """Of one whole run after another that warms up."""
    warm_up()
    torch.cuda.synchronize()
    begin = perf_counter()
    call()
    torch.cuda.synchronize()
    return perf_counter() - begin


def step_table(steps: Mapping[str, Mapping[int, float]], own: Sequence[str]) -> Table:
    """Milliseconds by kind and level; each of ``own``, which are ours, against all that stand before it."""
    names, levels = list(steps), list(steps[own[0]])
    table = [["ms", *(f"level {patch}" for patch in levels)]]
    table += [[name, *(f"{times[patch]:.3f}" for patch in levels)] for name, times in steps.items()]
    for one in own:
        for other in names[: names.index(one)]:
            ratios = (f"{steps[one][patch] / steps[other][patch]:.2f}" for patch in levels)
            table.append([f"{one} ÷ {other}", *ratios])
    return table


def run_table(whole: Mapping[str, float]) -> Table:
    """Seconds by kind, and how much faster each is than those before."""
    names = list(whole)
    table = [["", "s", *(f"against {name}" for name in names[:-1])]]
    for place, name in enumerate(names):
        against = [f"{whole[other] / whole[name]:.2f}×" if at < place else "" for at, other in enumerate(names[:-1])]
        table.append([name, f"{whole[name]:.2f}", *against])
    return table


def kernel_table(ours: Pipeline, patch: int, size: Size, most: int) -> Table:
    """GPU milliseconds by kernel of a step, the mean of a few; in the first row all of them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        times = time_steps(ours.backend, [(patch,)], size=size, repeat=TIMED, rounds=1)[(patch,)]
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    steps = len(times) + 2  # those before count too
    for event in profiler.events():
        spent[event.name] += event.device_time / 1000 / steps
        calls[event.name] += 1
    table = [["kernel", "ms", "calls"], ["all", f"{sum(spent.values()):.3f}", f"{sum(calls.values()) / steps:.0f}"]]
    for name, value in spent.most_common(most):
        table.append([f"`{name[:120]}`", f"{value:.3f}", f"{calls[name] / steps:.1f}"])
    return table


if __name__ == "__main__":
    main()
