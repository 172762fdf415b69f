"""Find the dynamic schedule's τ for a model, a step count and a size, from pictures of a list of prompts.

τ has no meaning of its own: the third difference depends on the model, on how many steps there are (it grows with the
cube of their length) and on how the noise levels are shifted. So the native runs of the prompts give what it is
relative to (`ddit.runtime.policies.smooth`), and τ is found by trying: runs of every prompt at one τ give its speed-up
and likeness to the native pictures, and a bisection of log τ finds the one that was asked for.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import exp, inf, log
from pathlib import Path
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from ddit.runtime.bundle.manifest import Calibration, Costs, CurvePoint, SmoothPoint
from ddit.runtime.costs import measure_costs
from ddit.runtime.errors import UsageError
from ddit.runtime.pipeline import Pipeline, Result
from ddit.runtime.policies import Dynamic
from ddit.runtime.policies.smooth import measure_smooth, smooth_at
from ddit.runtime.tools.plots import figure, save
from ddit.runtime.trace import Trace

ITERATIONS = 8  # halve the bracket, some four orders of magnitude wide, to a few per cent
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5

Report = Callable[[str], None]


@dataclass(frozen=True)
class Sample:
    """One prompt at one τ."""

    prompt: str
    speedup: float  # of all denoising steps over the native schedule's, by the levels' median milliseconds
    similarity: float  # SSIM to the native picture
    shares: dict[int, float]  # of the steps at every level


@dataclass(frozen=True)
class Point:
    """All prompts at one τ."""

    tau: float
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
        """Raise `UsageError` for what no τ can reach."""
        if self.speedup is not None and not 1 < self.speedup < inf:
            raise UsageError(f"the speed-up must be above 1, and finite, not {self.speedup:g}")
        if self.similarity is not None and not 0 < self.similarity <= 1:
            raise UsageError(f"the similarity must lie above 0 and at most at 1, not {self.similarity:g}")

    def fast_enough(self, point: Point) -> bool:
        """Whether τ may fall."""
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
    """Runs prompts at one step count and size, natively once and then at any τ."""

    def __init__(self, pipeline: Pipeline, schedule: Dynamic, *, steps: int, height: int, width: int):
        if not schedule.coarse:
            raise UsageError("the bundle has no coarse level: there is nothing to calibrate")
        if steps <= schedule.warmup:
            raise UsageError(
                f"calibrating needs more than {schedule.warmup} steps, not {steps}: the first {schedule.warmup} are "
                "native in any case"
            )
        self.pipeline = pipeline
        self.options = {"steps": steps, "height": height, "width": width}
        self.schedule = schedule
        self.smooth: tuple[SmoothPoint, ...] = ()
        self._native: dict[str, Result] = {}

    @cached_property
    def costs(self) -> Costs:
        """What steps cost here, measured when it is first asked for."""
        return measure_costs(self.pipeline, self.options["height"], self.options["width"])

    def native(self, prompt: str, seed: int) -> Result:
        """The prompt's native picture, made once."""
        if prompt not in self._native:
            native = replace(self.schedule, coarse=())  # not Native: its trace shows the statistics of this ρ
            self._native[prompt] = self.pipeline(prompt, seed=seed, schedule=native, **self.options)  # type: ignore[arg-type]
        return self._native[prompt]

    def find_smooth(self, prompts: Sequence[tuple[int, str]]) -> None:
        """Make τ relative to the smooth ones of these prompts."""
        steps, height, width = (self.options[name] for name in ("steps", "height", "width"))
        sigmas = self.pipeline.sigmas(steps, height, width)
        runs = [[record.statistic for record in self.native(text, seed).trace.steps] for seed, text in prompts]
        self.smooth = measure_smooth(runs, sigmas)
        self.schedule = replace(self.schedule, smooth=smooth_at(self.smooth, sigmas))

    def bracket(self, prompts: Sequence[tuple[int, str]]) -> tuple[float, float]:
        """Values of τ that make everything native, and everything coarse that can be."""
        one = replace(self.schedule, tau=1.0)
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

    def try_tau(self, tau: float, prompts: Sequence[tuple[int, str]]) -> Point:
        """Every prompt at a τ."""
        return Point(tau, tuple(self._sample(replace(self.schedule, tau=tau), seed, text) for seed, text in prompts))

    def _sample(self, schedule: Dynamic, seed: int, prompt: str) -> Sample:
        native = self.native(prompt, seed)
        result = self.pipeline(prompt, seed=seed, schedule=schedule, **self.options)  # type: ignore[arg-type]
        levels = result.trace.levels
        return Sample(
            prompt,
            self._cost(native.trace) / self._cost(result.trace),
            ssim(np.asarray(result.image), np.asarray(native.image)),
            {patch: levels.count(patch) / len(levels) for patch in self.costs.levels},
        )

    def _cost(self, trace: Trace) -> float:
        return sum(self.costs.levels[level] for level in trace.levels if level is not None)


def search(
    calibrator: Calibrator, prompts: Sequence[str], target: Target, report: Report, *, relative: bool = True
) -> Search:
    """Find τ on half of the prompts, drawn at random, and try it on the rest; a prompt's number is its seed.

    ``relative``: to smooth pictures; otherwise τ is absolute, as in the paper.

    Raises `UsageError` where what is asked for cannot be reached, with what can.
    """
    fitted, held_out = halves(prompts)
    report("measuring the levels")
    _ = calibrator.costs
    result = Search()
    report(f"making {len(fitted)} native pictures")
    if relative:
        calibrator.find_smooth(fitted)
    low, high = calibrator.bracket(fitted)

    fastest = _tried(result, calibrator, high, fitted, report)
    if target.speedup is not None and fastest.speedup < target.speedup:
        raise UsageError(
            f"a speed-up of {target.speedup:g} cannot be reached with {calibrator.options['steps']} steps and "
            f"{calibrator.schedule.warmup} native ones first: all coarse is {fastest.speedup:.2f} times faster"
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
    report(f"trying τ = {best.tau:.4g} on {len(held_out)} other prompts")
    result.held_out = calibrator.try_tau(best.tau, held_out)
    result.curve.sort(key=lambda point: point.tau)
    return result


def halves(prompts: Sequence[str]) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """The prompts that τ is chosen on and those that test it, with their numbers. Raises `UsageError` for too few."""
    if len(prompts) < 2:
        raise UsageError("calibrating needs two prompts or more: half of them are kept to test the result")
    # drawn, because lists are often ordered: every other prompt of one may be of a kind
    numbered = random.Random(0).sample([*enumerate(prompts)], len(prompts))
    return numbered[::2], numbered[1::2]


def _tried(
    result: Search, calibrator: Calibrator, tau: float, prompts: Sequence[tuple[int, str]], report: Report
) -> Point:
    point = calibrator.try_tau(tau, prompts)
    result.curve.append(point)
    report(f"τ = {tau:.4g}: {point.speedup:.2f}× at similarity {point.similarity:.3f}")
    return point


def calibration(calibrator: Calibrator, found: Search, best: Point) -> Calibration:
    """What the bundle keeps."""
    options, schedule, held_out = calibrator.options, calibrator.schedule, found.held_out
    assert held_out is not None
    return Calibration(
        steps=options["steps"],
        height=options["height"],
        width=options["width"],
        tau=best.tau,
        rho=schedule.rho,
        warmup=schedule.warmup,
        hold=schedule.hold,
        coarsest=max(schedule.coarse),
        smooth=calibrator.smooth,
        speedup=held_out.speedup,
        similarity=held_out.similarity,
        prompts=len(best.samples) + len(held_out.samples),
        backend=str(calibrator.pipeline.backend),
        costs=calibrator.costs,
        curve=tuple(CurvePoint(tau=point.tau, shares=point.shares) for point in found.curve),
    )


def spread(point: Point) -> tuple[str, str, str]:
    """Speed-ups, similarity and coarse steps over the prompts, as the tenth to the ninetieth percentile."""

    def between(values: Sequence[float], form: str) -> str:
        low, high = np.quantile(values, (0.1, 0.9))
        return f"{low:{form}}–{high:{form}}"

    return (
        between([sample.speedup for sample in point.samples], ".2f") + "×",
        f"{point.similarity:.3f} ({between([sample.similarity for sample in point.samples], '.3f')})",
        between([1 - sample.shares[min(sample.shares)] for sample in point.samples], ".0%"),
    )


def plot(found: Search, best: Point, path: Path) -> None:
    """Draw speed-up and similarity against τ, every prompt a dot. Needs matplotlib."""
    drawing = figure()
    upper, lower = drawing.subplots(2, 1, sharex=True)
    taus = [point.tau for point in found.curve]
    for axis, name, label in ((upper, "speedup", "speed-up over native"), (lower, "similarity", "SSIM to native")):
        for point in found.curve:
            values = [getattr(sample, name) for sample in point.samples]
            axis.plot([point.tau] * len(values), values, ".", color="C0", alpha=0.25, markersize=4)
        axis.plot(taus, [getattr(point, name) for point in found.curve], color="C0", label="prompts τ was chosen on")
        if found.held_out:
            axis.plot(best.tau, getattr(found.held_out, name), "o", color="C1", label="other prompts")
        axis.axvline(best.tau, color="grey", linestyle="--", linewidth=1)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    upper.legend(fontsize=8)
    upper.set_xscale("log")
    lower.set_xlabel(f"τ (chosen: {best.tau:.4g})")
    save(drawing, path)


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
