"""The trace of a run: what every denoising step did, as data and as a plot."""

import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ddit.runtime.errors import UsageError


@dataclass(frozen=True)
class StepRecord:
    """One denoising step of one sample."""

    step: int
    sigma: float  # noise level at which the model was asked
    level: int  # patch that it ran at
    milliseconds: float  # of the level's graph and the step graph; shared by the samples that ran together
    statistic: dict[int, float]  # σ_p of every coarse patch after the step; empty until three steps are done


@dataclass
class Trace:
    """A run, step by step."""

    prompt: str
    seed: int
    height: int
    width: int
    guidance: float
    backend: str
    schedule: dict[str, Any]
    steps: list[StepRecord] = field(default_factory=list)
    encode_milliseconds: float = 0.0  # text encoders
    decode_milliseconds: float = 0.0  # latent to picture

    @property
    def levels(self) -> list[int]:
        """The level of every step."""
        return [record.level for record in self.steps]

    def steps_per_level(self) -> dict[int, int]:
        """How many steps ran at each level."""
        return dict(sorted(Counter(self.levels).items()))

    def milliseconds_per_level(self) -> dict[int, float]:
        """Median milliseconds of a step at each level."""
        times: defaultdict[int, list[float]] = defaultdict(list)
        for record in self.steps:
            times[record.level].append(record.milliseconds)
        return {level: median(values) for level, values in sorted(times.items())}

    def total_milliseconds(self) -> float:
        """Milliseconds of all denoising steps."""
        return sum(record.milliseconds for record in self.steps)

    def summary(self) -> dict[str, Any]:
        """The figures that a report shows."""
        return {
            "steps": len(self.steps),
            "steps_per_level": self.steps_per_level(),
            "milliseconds_per_level": self.milliseconds_per_level(),
            "denoise_milliseconds": self.total_milliseconds(),
            "encode_milliseconds": self.encode_milliseconds,
            "decode_milliseconds": self.decode_milliseconds,
        }

    def to_json(self) -> str:
        """The whole trace as JSON."""
        return json.dumps({**asdict(self), "summary": self.summary()}, indent=2)


def figure() -> Any:
    """An empty matplotlib figure. Raises `UsageError` where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plots need matplotlib; install it with: pip install 'ddit[plot]'") from None
    return Figure(figsize=(8, 4.5), layout="constrained")


def plot_types() -> set[str]:
    """File endings that `plot` can write."""
    return {f".{kind}" for kind in figure().canvas.get_supported_filetypes()}


def plot(trace: Trace, path: Path) -> None:
    """Draw the level and the statistics of every step. Needs matplotlib: ``pip install 'ddit[plot]'``."""
    drawing = figure()
    upper, lower = drawing.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    numbers = range(len(trace.steps))
    upper.step(numbers, trace.levels, where="mid", color="black")
    upper.set_yscale("log", base=2)
    upper.set_yticks(sorted(set(trace.levels)), labels=[str(level) for level in sorted(set(trace.levels))])
    upper.set_ylabel("level (patch)")
    upper.set_title(f"“{trace.prompt}”", fontsize=10)
    for patch in sorted({patch for record in trace.steps for patch in record.statistic}):
        known = [record for record in trace.steps if patch in record.statistic]
        lower.plot(
            [r.step for r in known], [r.statistic[patch] for r in known], marker=".", label=f"σ of level {patch}"
        )
    if "tau" in trace.schedule:
        lower.axhline(trace.schedule["tau"], color="grey", linestyle="--", label="τ")
    lower.set_yscale("log")
    lower.set_xlabel("step")
    lower.set_ylabel("third difference")
    lower.legend(fontsize=8)
    drawing.savefig(path, dpi=120)
