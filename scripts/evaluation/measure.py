"""Measure what the schedules' pictures are like, with every metric that was asked for."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from ddit.runtime.console import say
from ddit.runtime.errors import DditError
from demo_model.scenes import Scene, balanced_scenes, render
from evaluation.metrics import METRICS, Frechet, Pictures, Sample, load, why_not
from evaluation.report import Measured
from evaluation.store import Store

NATIVE = "native"
DATA_SEED = 1001  # scenes that neither the demo model nor the classifier has been trained, chosen or tested on
DATA_SCENES = 2000  # the reference of Fréchet distances


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


def measure(
    store: Store,
    schedules: Sequence[str],
    samples: Sequence[Sample],
    functions: Mapping[str, Any],
    against: Store | None = None,
) -> tuple[list[Measured], dict[str, float]]:
    """Every schedule's records and metrics, and for every distribution distance what perfect pictures would get.

    Paired metrics compare with the native pictures, those of ``against`` where it is given.
    """
    measured = [
        Measured(schedule, [store.record(schedule, sample) for sample in samples], {}, {}) for schedule in schedules
    ]
    floors: dict[str, float] = {}
    for name, function in functions.items():
        say(f"measuring {name}")
        if METRICS[name].kind == "distribution":
            floors |= refer(function, name, store, samples)
        for one in measured:
            # against itself the native schedule has no paired metric, nor a distance where it is the reference
            if METRICS[name].kind == "absolute":
                for some, pictures in store.pictures(one.schedule, samples):
                    for answer, values in function(pictures, some).items():
                        one.values.setdefault(answer, []).extend(of_clips(values, store.frames))
            elif METRICS[name].kind == "paired" and (against or one.schedule != NATIVE):
                references = (against or store).pictures(NATIVE, samples)
                pairs = zip(store.pictures(one.schedule, samples), references, strict=True)
                one.values[name] = [
                    value
                    for (_, pictures), (_, natives) in pairs
                    for value in of_clips(function(pictures, natives), store.frames)
                ]
            elif METRICS[name].kind == "distribution" and (one.schedule != NATIVE or name in floors):
                one.distances[name] = function(pictures for _, pictures in store.pictures(one.schedule, samples))
    return measured, floors


def of_clips(values: Sequence[float], frames: int) -> list[float]:
    """The means of so many values each: of a clip that of its frames."""
    return [fmean(values[start : start + frames]) for start in range(0, len(values), frames)]


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
