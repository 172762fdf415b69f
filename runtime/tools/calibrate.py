"""Find the number of a policy that gives a speed-up or keeps a quality, from pictures of a list of prompts.

A policy trades quality for speed by one number, its knob: the dynamic schedule's τ, the adaptive policy's tolerance, a
method of reuse's threshold. It is found by trying: runs of every prompt at one value give its speed-up and likeness to
the native pictures, and a bisection of the value's logarithm finds the one that was asked for.

The dynamic schedule's τ has no meaning of its own: the third difference depends on the model, on how many steps there
are (it grows with the cube of their length) and on how the noise levels are shifted. So the native runs of the prompts
give what it is relative to (`ddit.runtime.policies.smooth`).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import exp, inf, log
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddit.runtime.bundle.manifest import AdaptiveCalibration, Costs, CurvePoint, DynamicCalibration, SmoothPoint
from ddit.runtime.costs import measure_costs
from ddit.runtime.errors import UsageError
from ddit.runtime.pipeline import Pipeline, Result
from ddit.runtime.policies import Adaptive, Dynamic, Native, Policy, Reusing
from ddit.runtime.policies.smooth import measure_smooth, smooth_at
from ddit.runtime.shapes import Size
from ddit.runtime.tools.plots import figure, save
from ddit.runtime.trace import Trace

ITERATIONS = 8  # halve the bracket, some four orders of magnitude wide, to a few per cent
BRACKET = (1e-4, 10.0)  # of knobs other than τ: tolerances and thresholds are about errors relative to a picture
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5

Report = Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """One prompt at one value."""

    prompt: str
    speedup: float  # of all denoising steps over the native schedule's, by the levels' median milliseconds
    similarity: float  # SSIM to the native picture
    shares: dict[int, float]  # of the steps at every level; the rest was predicted


@dataclass(frozen=True)
class Point:
    """All prompts at one value."""

    value: float
    samples: tuple[Sample, ...]

    @property
    def speedup(self) -> float:
        """Of all prompts together: native time over their time."""
        return len(self.samples) / sum(1 / sample.speedup for sample in self.samples)

    @property
    def similarity(self) -> float:
        """Mean SSIM."""
        return mean(sample.similarity for sample in self.samples)

    @property
    def shares(self) -> dict[int, float]:
        """Mean share of the steps at every level."""
        return {patch: mean(sample.shares[patch] for sample in self.samples) for patch in self.samples[0].shares}


@dataclass(frozen=True)
class Target:
    """What is asked for: a speed-up to reach, or a similarity to keep."""

    speedup: float | None = None
    similarity: float | None = None

    def __post_init__(self) -> None:
        """Raise `UsageError` for what nothing can reach."""
        if self.speedup is not None and not 1 < self.speedup < inf:
            raise UsageError(f"the speed-up must be above 1, and finite, not {self.speedup:g}")
        if self.similarity is not None and not 0 < self.similarity <= 1:
            raise UsageError(f"the similarity must lie above 0 and at most at 1, not {self.similarity:g}")

    def fast_enough(self, point: Point) -> bool:
        """Whether the value may fall."""
        if self.speedup is not None:
            return point.speedup >= self.speedup
        assert self.similarity is not None
        return point.similarity < self.similarity

    def miss(self, point: Point) -> float:
        """How far a point is from what was asked, for choosing the nearest; a similarity may not be undercut."""
        if self.speedup is not None:
            return abs(log(point.speedup / self.speedup))
        assert self.similarity is not None
        under = point.similarity < self.similarity
        return float("inf") if under else -point.speedup


@dataclass
class Search:
    """A finished search: the curve that was tried, what was chosen, and how it does on prompts that it never saw."""

    curve: list[Point] = field(default_factory=list)
    held_out: Point | None = None

    def best(self, target: Target) -> Point:
        """The point nearest to what was asked for."""
        return min(self.curve, key=target.miss)


class Calibrator:
    """Runs prompts at one step count and size, natively once and then under a policy at any value of its knob."""

    def __init__(self, pipeline: Pipeline, policy: Policy, *, steps: int, size: Size):
        if policy.knob() is None:
            raise UsageError(f"{policy} has no number to calibrate")
        if isinstance(policy, Dynamic):
            policy = replace(policy, smooth=None)  # until `find_smooth` has one of these prompts
            if not policy.coarse:
                raise UsageError("the bundle has no coarse level: there is no τ to calibrate")
            if steps <= policy.warmup:
                raise UsageError(
                    f"calibrating needs more than {policy.warmup} steps, not {steps}: the first {policy.warmup} are "
                    "native in any case"
                )
        self.pipeline = pipeline
        self.steps, self.size = steps, size
        self.options = {"steps": steps, **size.by_name()}
        self.policy = policy
        self.smooth: tuple[SmoothPoint, ...] = ()
        self._native: dict[str, Result] = {}

    @property
    def letter(self) -> str:
        """What the knob is called in reports."""
        name = self.policy.knob()
        return "τ" if name == "tau" else str(name)

    @cached_property
    def costs(self) -> Costs:
        """What steps cost here, measured when it is first asked for."""
        return measure_costs(self.pipeline, self.size)

    def native(self, prompt: str, seed: int) -> Result:
        """The prompt's native picture, made once."""
        if prompt not in self._native:
            # not Native for a dynamic schedule: its trace is to show the statistics of this ρ
            dynamic = isinstance(self.policy, Dynamic)
            native = replace(self.policy, coarse=()) if dynamic else Native(self.pipeline.bundle.manifest.native)  # type: ignore[type-var]
            self._native[prompt] = self.pipeline(prompt, seed=seed, schedule=native, **self.options)  # type: ignore[arg-type]
        return self._native[prompt]

    def find_smooth(self, prompts: Sequence[tuple[int, str]]) -> None:
        """Make the dynamic schedule's τ relative to the smooth ones of these prompts."""
        sigmas = self.pipeline.sigmas(**self.options)
        runs = [[record.statistic for record in self.native(text, seed).trace.steps] for seed, text in prompts]
        self.smooth = measure_smooth(runs, sigmas)
        self.policy = replace(self.policy, smooth=smooth_at(self.smooth, sigmas))  # type: ignore[type-var]

    def bracket(self, prompts: Sequence[tuple[int, str]]) -> tuple[float, float]:
        """Values of the knob that make every picture native, and as fast as it can be."""
        if not isinstance(self.policy, Dynamic):
            return BRACKET
        one = replace(self.policy, tau=1.0)
        taus = [
            value / one.threshold(patch, record.step)
            for seed, prompt in prompts
            for record in self.native(prompt, seed).trace.steps
            for patch, value in record.statistic.items()
            if value > 0
        ]
        if not taus:
            raise UsageError("τ cannot be found: nothing changes between the steps of these pictures")
        return min(taus) / 2, max(taus) * 2

    def try_value(self, value: float, prompts: Sequence[tuple[int, str]]) -> Point:
        """Every prompt at a value of the knob."""
        policy = self.policy.turned(value)
        return Point(value, tuple(self._sample(policy, seed, text) for seed, text in prompts))

    def _sample(self, policy: Policy, seed: int, prompt: str) -> Sample:
        native = self.native(prompt, seed)
        result = self.pipeline(prompt, seed=seed, schedule=policy, **self.options)  # type: ignore[arg-type]
        levels = result.trace.levels
        return Sample(
            prompt,
            self._cost(native.trace) / self._cost(result.trace),
            similarity(result, native),
            {patch: levels.count(patch) / len(levels) for patch in self.costs.levels},
        )

    def _cost(self, trace: Trace) -> float:
        return sum(self.costs.levels[level] for level in trace.levels if level is not None)


def search(
    calibrator: Calibrator, prompts: Sequence[str], target: Target, report: Report, *, relative: bool = True
) -> Search:
    """Find the knob's value on half of the prompts, drawn at random, and try it on the rest.

    A prompt's number is its seed. ``relative``: τ is one to smooth pictures; otherwise it is absolute, as in the paper.

    Raises `UsageError` where what is asked for cannot be reached, with what can.
    """
    fitted, held_out = halves(prompts)
    report("measuring the levels")
    _ = calibrator.costs
    result = Search()
    report(f"making {len(fitted)} native pictures")
    if relative and isinstance(calibrator.policy, Dynamic):
        calibrator.find_smooth(fitted)
    low, high = calibrator.bracket(fitted)

    fastest = _tried(result, calibrator, high, fitted, report)
    if target.speedup is not None and fastest.speedup < target.speedup:
        raise UsageError(
            f"a speed-up of {target.speedup:g} cannot be reached with {calibrator.options['steps']} steps; "
            f"{calibrator.policy.turned(high)} is {fastest.speedup:.2f} times faster"
        )
    if target.fast_enough(fastest):
        for _ in range(ITERATIONS):
            middle = exp((log(low) + log(high)) / 2)
            if target.fast_enough(_tried(result, calibrator, middle, fitted, report)):
                high = middle
            else:
                low = middle
    best = result.best(target)
    if target.miss(best) == float("inf"):
        similarities = [point.similarity for point in result.curve]
        raise UsageError(
            f"a similarity of {target.similarity:g} cannot be kept; the nearest is {max(similarities):.3f}"
        )
    report(f"trying {calibrator.letter} = {best.value:.4g} on {len(held_out)} other prompts")
    result.held_out = calibrator.try_value(best.value, held_out)
    result.curve.sort(key=lambda point: point.value)
    return result


def halves(prompts: Sequence[str]) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """The prompts that the value is chosen on and those that test it, numbered. Raises `UsageError` for too few."""
    if len(prompts) < 2:
        raise UsageError("calibrating needs two prompts or more: half of them are kept to test the result")
    # drawn, because lists are often ordered: every other prompt of one may be of a kind
    numbered = random.Random(0).sample([*enumerate(prompts)], len(prompts))
    return numbered[::2], numbered[1::2]


def _tried(
    result: Search, calibrator: Calibrator, value: float, prompts: Sequence[tuple[int, str]], report: Report
) -> Point:
    point = calibrator.try_value(value, prompts)
    result.curve.append(point)
    report(f"{calibrator.letter} = {value:.4g}: {point.speedup:.2f}× at similarity {point.similarity:.3f}")
    return point


def calibration(calibrator: Calibrator, found: Search, best: Point) -> DynamicCalibration | AdaptiveCalibration | None:
    """What the bundle keeps; None where it has no place for settings of this policy."""
    policy, held_out = calibrator.policy.turned(best.value), found.held_out
    assert held_out is not None
    how: dict[str, Any] = {
        **calibrator.options,
        "speedup": held_out.speedup,
        "similarity": held_out.similarity,
        "prompts": len(best.samples) + len(held_out.samples),
        "backend": str(calibrator.pipeline.backend),
        "costs": calibrator.costs,
        "curve": tuple(CurvePoint(value=point.value, shares=point.shares) for point in found.curve),
    }
    if isinstance(policy, Dynamic):
        settings = {name: getattr(policy, name) for name in ("tau", "rho", "warmup", "hold")}
        return DynamicCalibration(**how, **settings, coarsest=max(policy.coarse), smooth=calibrator.smooth)
    if isinstance(policy, Reusing) and isinstance(policy.levels, Native) and isinstance(policy.reuse, Adaptive):
        return AdaptiveCalibration(**how, tolerance=policy.reuse.tolerance, order=policy.reuse.order)
    return None


def spread(point: Point) -> tuple[str, str, str]:
    """Speed-ups, similarity and cheaper steps over the prompts, as the tenth to the ninetieth percentile."""

    def between(values: Sequence[float], form: str) -> str:
        low, high = np.quantile(values, (0.1, 0.9))
        return f"{low:{form}}–{high:{form}}"

    return (
        between([sample.speedup for sample in point.samples], ".2f") + "×",
        f"{point.similarity:.3f} ({between([sample.similarity for sample in point.samples], '.3f')})",
        between([1 - sample.shares[min(sample.shares)] for sample in point.samples], ".0%"),
    )


def plot(found: Search, best: Point, letter: str, path: Path) -> None:
    """Draw speed-up and similarity against the knob's value, every prompt a dot. Needs matplotlib."""
    drawing = figure()
    upper, lower = drawing.subplots(2, 1, sharex=True)
    tried = [point.value for point in found.curve]
    for axis, name, label in ((upper, "speedup", "speed-up over native"), (lower, "similarity", "SSIM to native")):
        for point in found.curve:
            values = [getattr(sample, name) for sample in point.samples]
            axis.plot([point.value] * len(values), values, ".", color="C0", alpha=0.25, markersize=4)
        axis.plot(
            tried, [getattr(point, name) for point in found.curve], color="C0", label=f"prompts {letter} was chosen on"
        )
        if found.held_out:
            axis.plot(best.value, getattr(found.held_out, name), "o", color="C1", label="other prompts")
        axis.axvline(best.value, color="grey", linestyle="--", linewidth=1)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    upper.legend(fontsize=8)
    upper.set_xscale("log")
    lower.set_xlabel(f"{letter} (chosen: {best.value:.4g})")
    save(drawing, path)


def similarity(result: Result, other: Result) -> float:
    """`ssim` of two pictures; of two clips the mean over their frames."""
    pairs = zip(result.frames, other.frames, strict=True)
    return float(np.mean([ssim(np.asarray(one), np.asarray(two)) for one, two in pairs]))


def ssim(picture: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Structural similarity of two pictures (H, W, 3), 1 for equal ones.

    Wang et al. 2004 with their Gaussian window of 11 pixels and σ = 1.5, mean over pixels and channels; the border that
    the window does not cover is left out. Equal to scikit-image's, which the runtime does not need for this.
    """
    radius = SSIM_WINDOW // 2
    window = np.exp(-np.square(np.arange(-radius, radius + 1) / SSIM_SIGMA) / 2)
    window /= window.sum()

    def blur(values: NDArray[np.float64]) -> NDArray[np.float64]:
        for axis in (0, 1):
            views = np.lib.stride_tricks.sliding_window_view(values, SSIM_WINDOW, axis=axis)
            values = views @ window
        return values

    x, y = picture.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    structure = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((structure / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())
