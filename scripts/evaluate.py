"""Compare patch schedules with the native one: quality, compute, time. docs/evaluate.md tells how to read the report.

    python scripts/evaluate.py demo.bundle --prompts scenes:100 --out runs/evaluation \\
        --schedule native --schedule dynamic --schedule dynamic:tau=2 --schedule fixed:8x10,4x20,2x20

Pictures that are already under --out are not made again: a run that was interrupted goes on where it stopped, and
another schedule, prompt or metric costs only what it adds.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ddit.runtime import Bundle, Pipeline
from ddit.runtime.bundle import MANIFEST
from ddit.runtime.console import DditCommand, say, set_up_logging
from ddit.runtime.errors import DditError, UsageError
from ddit.runtime.policies.schedule import Fixed

try:
    from command_line.prompts import PROMPT_SEED, read_prompts
    from demo_model.scenes import BACKGROUNDS, Scene, balanced_scenes, render
    from evaluation.flops import level_flops
    from evaluation.metrics import METRICS, Frechet, Pictures, Sample, load, why_not
    from evaluation.report import Facts, Measured, write_report
    from evaluation.store import Settings, Store, describe_machine, make_missing
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error.name} is not installed: pip install 'ddit[cpu,evaluate]'") from None

NATIVE = "native"
DATA_SEED = 1001  # scenes that neither the demo model nor the classifier has been trained, chosen or tested on
DATA_SCENES = 2000  # the reference of Fréchet distances
SEED_STRIDE = 10_000


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--prompts", required=True, help="A file with a prompt a line, or scenes:N or scenes:START-STOP, the demo's."
)
@click.option("--background", type=click.Choice(BACKGROUNDS), help="Only scenes with this background.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Pictures of every prompt.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: the bundle's]")
@click.option(
    "--schedule",
    "schedules",
    multiple=True,
    default=("dynamic",),
    show_default=True,
    help="What to compare with native, as for ddit-run generate. Give it several times.",
)
@click.option(
    "--metric",
    "names",
    multiple=True,
    type=click.Choice(list(METRICS)),
    help="What to measure. Give it several times.  [default: all that can be measured here]",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the results.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Pictures to make at once.")
@click.option("--height", type=int, help="Pixels.  [default: the profile's optimum]")
@click.option("--width", type=int, help="Pixels.  [default: the profile's optimum]")
@click.option("--guidance", type=float, help="Guidance scale.  [default: the bundle's]")
@click.option(
    "--carry", type=float, help="Share of native detail that coarse steps take over.  [default: the bundle's]"
)
@click.option("--backend", default="cpu", show_default=True, help="cpu, cuda, or an ONNX Runtime execution provider.")
@click.option("--threads", type=click.IntRange(1), help="Threads of one graph.  [default: all cores]")
def main(
    bundle: Path,
    prompts: str,
    background: str | None,
    seeds: int,
    steps: int | None,
    schedules: tuple[str, ...],
    names: tuple[str, ...],
    out: Path,
    batch: int,
    height: int | None,
    width: int | None,
    guidance: float | None,
    carry: float | None,
    backend: str,
    threads: int | None,
) -> None:
    """Compare schedules with the native one, picture by picture: the same prompts, seeds and steps."""
    set_up_logging(0)
    # before the work, not after it: whatever would keep the results from being what was asked for
    samples = read_samples(prompts, seeds, background)
    functions, skipped = load_metrics(names, samples)
    metrics = [METRICS[name] for name in functions]
    pipeline = Pipeline.open(bundle, backend=backend, threads=threads)
    manifest = pipeline.bundle.manifest
    steps = steps or manifest.sampler.steps
    schedules = tuple(dict.fromkeys((NATIVE, *schedules)))
    check_schedules(pipeline, schedules, steps)
    optimum = manifest.profile.entry[0]
    settings = Settings(
        bundle=hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest(),
        backend=backend,
        threads=threads,
        batch=batch,
        height=height or optimum.height.optimum,
        width=width or optimum.width.optimum,
        guidance=manifest.guidance.default if guidance is None else guidance,
        carry=manifest.carry if carry is None else carry,
        machine=describe_machine(backend),
    )
    flops = level_flops(pipeline.bundle, height=settings.height, width=settings.width)
    store = Store(out, steps)
    make_missing(store, pipeline, schedules, samples, settings)

    measured, floors = measure(store, schedules, samples, functions)
    facts = Facts(
        bundle=describe_bundle(pipeline.bundle),
        prompts=prompts if background is None else f"{prompts}, {background} ones",
        seeds=seeds,
        settings=settings,
        flops=flops,
        native=manifest.native,
        skipped=skipped,
        floors=floors,
    )
    write_report(out, store, measured, samples, metrics, facts)
    say(f"results.csv, pictures.csv, report.md, plot.png and grid.png are in {out}/")


def read_samples(prompts: str, seeds: int, background: str | None = None) -> list[Sample]:
    """Every prompt with its seeds, the seeds of a prompt one after another. Raises `UsageError`.

    Prompt number i has the seeds i, i + 10,000, …: no two pictures start from the same noise, and a longer list goes on
    from a shorter one. With a ``background``, only the scenes that have it are taken, with their numbers.
    """
    asked = read_prompts(prompts)
    described: list[tuple[int, str, Scene | None]]
    if isinstance(asked, range):
        scenes = balanced_scenes(asked.stop, PROMPT_SEED)
        chosen = [number for number in asked if background in (None, scenes[number].background)]
        if not chosen:
            raise UsageError(f"none of {prompts} has a {background} background; take more scenes")
        described = [(number, scenes[number].caption, scenes[number]) for number in chosen]
    elif background:
        raise UsageError("--background chooses among scenes; give --prompts scenes:N or leave it out")
    else:
        described = [(number, prompt, None) for number, prompt in enumerate(asked)]
    return [
        Sample(number, prompt, number + SEED_STRIDE * again, scene)
        for number, prompt, scene in described
        for again in range(seeds)
    ]


def load_metrics(names: Sequence[str], samples: Sequence[Sample]) -> tuple[dict[str, Any], list[str]]:
    """The functions of the metrics to measure, and a line for each that cannot be. Raises if that was asked for."""
    functions, skipped = {}, []
    for metric in METRICS.values():
        if names and metric.name not in names:
            continue
        try:
            if reason := why_not(metric, samples):
                raise reason
            functions[metric.name] = load(metric)
        except DditError as error:
            if names:
                raise
            skipped.append(str(error))
    return functions, skipped


def check_schedules(pipeline: Pipeline, schedules: Sequence[str], steps: int) -> None:
    """See that every schedule can be read and has the right number of steps. Raises `UsageError`."""
    for text in schedules:
        schedule = pipeline.schedule(text)
        if isinstance(schedule, Fixed) and len(schedule.levels) != steps:
            raise UsageError(f"{text} has {len(schedule.levels)} steps, not {steps}; all schedules need as many")


def describe_bundle(bundle: Bundle) -> str:
    """A bundle in a line, for the report."""
    manifest = bundle.manifest
    levels = ", ".join(
        f"{patch}" + ("" if manifest.level(patch).trained else " (untrained)") for patch in manifest.patches
    )
    return f"{manifest.model.id}, {manifest.dtype}, levels {levels}, default τ {manifest.schedule.tau:g}"


def measure(
    store: Store, schedules: Sequence[str], samples: Sequence[Sample], functions: Mapping[str, Any]
) -> tuple[list[Measured], dict[str, float]]:
    """Every schedule's records and metrics, and for every distribution distance what perfect pictures would get."""
    measured = [
        Measured(schedule, [store.record(schedule, sample) for sample in samples], {}, {}) for schedule in schedules
    ]
    floors: dict[str, float] = {}
    for name, function in functions.items():
        say(f"measuring {name}")
        if METRICS[name].kind == "distribution":
            floors |= refer(function, name, store, samples)
        for one in measured:
            # beside itself the native schedule has no paired metric, nor a distance where it is the reference
            if METRICS[name].kind == "absolute":
                for some, pictures in store.pictures(one.schedule, samples):
                    for answer, values in function(pictures, some).items():
                        one.values.setdefault(answer, []).extend(values)
            elif METRICS[name].kind == "paired" and one.schedule != NATIVE:
                pairs = zip(store.pictures(one.schedule, samples), store.pictures(NATIVE, samples), strict=True)
                one.values[name] = [
                    value for (_, pictures), (_, natives) in pairs for value in function(pictures, natives)
                ]
            elif METRICS[name].kind == "distribution" and (one.schedule != NATIVE or name in floors):
                one.distances[name] = function(pictures for _, pictures in store.pictures(one.schedule, samples))
    return measured, floors


def refer(distance: Frechet, name: str, store: Store, samples: Sequence[Sample]) -> dict[str, float]:
    """Set the reference of a distance: rendered scenes where the prompts are scenes, else the native pictures.

    With scenes, also gives the distance of these prompts' own rendered scenes: what perfect pictures would have at this
    number.
    """
    scenes = [sample.scene for sample in samples if sample.scene]
    if not scenes:
        distance.refer_to(pictures for _, pictures in store.pictures(NATIVE, samples))
        return {}
    distance.refer_to(rendered(balanced_scenes(DATA_SCENES, DATA_SEED)))
    return {name: distance(rendered(scenes))}


def rendered(scenes: Sequence[Scene]) -> Iterator[Pictures]:
    """Scenes as they should look, a few at a time."""
    for start in range(0, len(scenes), 50):
        pictures = (render(scenes[start : start + 50]) + 1) * 127.5
        yield pictures.round().byte().permute(0, 2, 3, 1).numpy()


if __name__ == "__main__":
    main()
