"""Find what methods of reuse keep in a bundle, from native runs: TeaCache's polynomial and DPCache's path."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from ddit.runtime.bundle.manifest import LARGEST_COEFFICIENT, GateInfo, StepPath
from ddit.runtime.errors import UsageError
from ddit.runtime.pipeline import Pipeline, Result
from ddit.runtime.policies import DPCache, Native, Policy, Reuse, Reusing, TeaCache
from ddit.runtime.policies.dpcache import FORCED
from ddit.runtime.policies.parse import NO_GATE
from ddit.runtime.policies.teacache import polynomial
from ddit.runtime.request import Request
from ddit.runtime.shapes import Size
from ddit.runtime.tools.calibrate import halves, similarity
from ddit.runtime.tools.step_path import MOST_STEPS, best_path, inner_products

FloatArray = NDArray[np.float32]
Report = Callable[[str], None]

DEGREE = 4  # of TeaCache's polynomials
LEAST_POINTS = 10  # that one is fitted to


@dataclass(frozen=True)
class Setting:
    """What native runs are made at."""

    steps: int
    size: Size

    def options(self) -> dict[str, int]:
        """The same as a call of the pipeline takes it."""
        return {"steps": self.steps, **self.size.by_name()}


@dataclass(frozen=True)
class HeldOut:
    """How a method does on prompts that nothing was found on."""

    prompts: int
    computed: float  # mean number of computed steps
    similarity: float  # mean SSIM to the native pictures


def find_path(pipeline: Pipeline, texts: Sequence[str], setting: Setting, computed: int, report: Report) -> StepPath:
    """DPCache's path of so many computed steps, found on half of the prompts. Raises `UsageError`."""
    if not FORCED < computed < setting.steps <= MOST_STEPS:
        raise UsageError(
            f"dpcache chooses more than {FORCED} steps and fewer than all, of {MOST_STEPS} at most, not {computed} of "
            f"{setting.steps}; give --computed and --steps"
        )
    fitted, _ = halves(texts)
    report(f"making {len(fitted)} native pictures")
    native = Native(pipeline.bundle.manifest.native)
    products = [inner_products(velocities(pipeline, one, setting, native)[0]) for one in fitted]
    report("choosing the steps")
    path, error = best_path(products, pipeline.sigmas(**setting.options()), computed)
    return StepPath(**setting.options(), computed=path, error=error, prompts=len(fitted))


def fit_gate(pipeline: Pipeline, texts: Sequence[str], setting: Setting, report: Report) -> tuple[GateInfo, float]:
    """TeaCache's polynomial on half of the prompts, and the root mean square of what it misses. Raises `UsageError`.

    It goes from the relative L1 change of the modulated input to that of the velocity.
    """
    gate = pipeline.bundle.manifest.gate
    if gate is None:
        raise UsageError(f"teacache needs a gate graph, which the bundle lacks; {NO_GATE}")
    fitted, _ = halves(texts)
    if len(fitted) * (setting.steps - 1) < LEAST_POINTS:
        raise UsageError(f"a polynomial needs {LEAST_POINTS} changes; give more prompts or --steps")
    report(f"making {len(fitted)} native pictures")
    watched = Reusing(Native(pipeline.bundle.manifest.native), TeaCache(gate.coefficients, threshold=0.0))
    points: list[tuple[float, float]] = []
    for one in fitted:
        found, result = velocities(pipeline, one, setting, watched)
        changes = [record.figures["change"] for record in result.trace.steps[1:]]
        points += zip(changes, relative_changes(found), strict=True)
    inputs, outputs = np.array(points).T
    powers = np.vander(inputs, DEGREE + 1)
    coefficients = tuple(np.linalg.lstsq(powers, outputs, rcond=None)[0].tolist())
    if max(map(abs, coefficients)) > LARGEST_COEFFICIENT:
        raise UsageError(
            "the changes of these prompts are too much alike for a polynomial; give others or more --steps"
        )
    missed = np.array([polynomial(coefficients, value) for value in inputs]) - outputs
    source = f"fitted to {len(points)} steps of {len(fitted)} prompts, {setting.steps} at {setting.size}"
    kept = GateInfo(graph=gate.graph, coefficients=coefficients, source=source)
    return kept, float(np.sqrt(np.mean(missed**2)))


def try_reuse(pipeline: Pipeline, texts: Sequence[str], setting: Setting, reuse: Reuse, report: Report) -> HeldOut:
    """A method on the other half of the prompts."""
    _, others = halves(texts)
    report(f"trying it on {len(others)} other prompts")
    native = Native(pipeline.bundle.manifest.native)
    counts, similarities = [], []
    for seed, text in others:
        plain, reused = (
            pipeline(text, seed=seed, schedule=policy, **setting.options())  # type: ignore[arg-type]
            for policy in (native, Reusing(native, reuse))
        )
        counts.append(setting.steps - reused.trace.predicted)
        similarities.append(similarity(reused, plain))
    return HeldOut(len(others), mean(counts), mean(similarities))


def path_reuse(path: StepPath) -> DPCache:
    """The method that follows a path."""
    return DPCache(path.steps, path.computed)


def velocities(pipeline: Pipeline, one: tuple[int, str], setting: Setting, policy: Policy) -> tuple[FloatArray, Result]:
    """The velocities (T, C, …, H, W) of a run in which every step is computed: (zₖ₊₁ − zₖ) / Δσ."""
    seed, text = one
    latents: list[FloatArray] = []
    result = pipeline(
        text,
        seed=seed,
        schedule=policy,
        **setting.options(),  # type: ignore[arg-type]
        on_step=lambda progress: latents.append(progress.latents()[0]),
    )
    (run,) = pipeline.resolve([Request(text, seed, schedule=policy, **setting.options())])  # type: ignore[arg-type]
    latents.insert(0, run.start(latents[0].shape, latents[0].shape))
    return np.diff(np.stack(latents), axis=0) / np.diff(run.sigmas).reshape(-1, *(1 for _ in latents[0].shape)), result


def relative_changes(values: FloatArray) -> list[float]:
    """mean|v − v′| / mean|v′| of values (T, …) from one to the next."""
    return [float(np.abs(now - before).mean() / np.abs(before).mean()) for before, now in pairwise(values)]
