"""Plots of runs. They need matplotlib, which the runtime does without otherwise: ``pip install 'ddit[plot]'``."""

import warnings
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from PIL import Image

from ddit.runtime.complexity import Complexity
from ddit.runtime.console import printable
from ddit.runtime.errors import UsageError
from ddit.runtime.trace import Trace

LONGEST_TITLE = 100  # characters


def figure() -> Any:
    """An empty matplotlib figure. Raises `UsageError` where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("plots need matplotlib; install it with: pip install 'ddit[plot]'") from None
    return Figure(figsize=(8, 4.5), layout="constrained")


def plot_types() -> set[str]:
    """File endings of plots. Raises `UsageError` where matplotlib is missing."""
    figure()
    return {".png", ".svg", ".pdf"}


def save(drawing: Any, path: Path) -> None:
    """Write a figure. A letter that the font has not becomes a box, without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        drawing.savefig(path, dpi=120)


def plot_schedule(trace: Trace, path: Path) -> None:
    """Draw the level and the statistics of every step."""
    drawing = figure()
    upper, lower = drawing.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    numbers = range(len(trace.steps))
    computed = [(record.step, record.level) for record in trace.steps if record.level is not None]
    levels = sorted({level for _, level in computed})
    # a predicted step stands, hollow, on the level of the computed one before it
    effective = [
        max((one for one in computed if one[0] <= record.step), default=computed[0])[1] for record in trace.steps
    ]
    upper.step(numbers, effective, where="mid", color="lightgrey")
    upper.plot(*zip(*computed, strict=True), "o", color="black", markersize=4, label="computed")
    if trace.predicted:
        predicted = [(r.step, level) for r, level in zip(trace.steps, effective, strict=True) if r.level is None]
        upper.plot(*zip(*predicted, strict=True), "o", color="grey", fillstyle="none", markersize=4, label="predicted")
        upper.legend(fontsize=8)
    if small := [record.step for record in trace.steps if record.scale < 1]:
        for panel in (upper, lower):
            panel.axvspan(trace.steps[0].step - 0.5, max(small) + 0.5, color="tab:blue", alpha=0.1, linewidth=0)
        sizes = " and ".join(f"{height}×{width}" for height, width in trace.smaller_steps())
        upper.text(trace.steps[0].step - 0.4, levels[0], f" at {sizes}", fontsize=8, color="tab:blue", va="bottom")
    upper.set_yscale("log", base=2)
    upper.set_yticks(levels, labels=[str(level) for level in levels])
    upper.minorticks_off()
    upper.set_ylabel("level (patch)")
    title = printable(shorten(trace.prompt, LONGEST_TITLE, placeholder=" …"))[:LONGEST_TITLE]
    upper.set_title(f"“{title}”", fontsize=10, parse_math=False)  # a prompt's dollar signs are no formulas
    if any("expected_error" in record.figures for record in trace.steps):
        _plot_expected_errors(lower, trace)
    else:
        _plot_statistics(lower, trace)
    lower.set_yscale("log")
    lower.set_xlabel("step")
    lower.legend(fontsize=8)
    save(drawing, path)


def _plot_expected_errors(axis: Any, trace: Trace) -> None:
    """What predicting every step was expected to do to the picture, and the tolerance."""
    known = [record for record in trace.steps if "expected_error" in record.figures]
    axis.plot([r.step for r in known], [r.figures["expected_error"] for r in known], marker=".", label="expected error")
    axis.axhline(trace.schedule["reuse"]["tolerance"], color="grey", linestyle="--", label="tolerance")
    axis.set_ylabel("error of the picture, if predicted")


def _plot_statistics(axis: Any, trace: Trace) -> None:
    """The third differences' statistics, and τ where they decide."""
    numbers = range(len(trace.steps))
    axis.set_ylabel("third difference")
    for patch in sorted({patch for record in trace.steps for patch in record.statistic}):
        known = [record for record in trace.steps if patch in record.statistic]
        axis.plot([r.step for r in known], [r.statistic[patch] for r in known], marker=".", label=f"σ of level {patch}")
    if "tau" in trace.schedule:
        tau, smooth_by_patch = trace.schedule["tau"], trace.schedule["smooth"]
        if smooth_by_patch:
            styles = ("--", ":", "-.")
            for number, (patch, smooth) in enumerate(smooth_by_patch.items()):
                limit = tau * np.asarray(smooth)
                style = styles[number % len(styles)]
                axis.plot(numbers, limit, color="grey", linestyle=style, label=f"τ of level {patch}")
        else:
            axis.axhline(tau, color="grey", linestyle="--", label="τ")


def plot_complexity(image: Image.Image, complexity: Complexity, path: Path) -> None:
    """Lay where and when over the picture, side by side."""
    drawing = figure()
    drawing.set_size_inches(12, 12 / 3 * image.height / image.width + 0.9)
    panels = drawing.subplots(1, 3)
    grey = np.asarray(image.convert("L"))
    extent = (0, image.width, image.height, 0)
    panels[0].imshow(image)
    panels[0].set_title("picture")
    maps = (
        (panels[1], complexity.where(), "inferno", "where: detail, as a share of the mean"),
        (panels[2], complexity.when(), "viridis", "when: mean step of the detail"),
    )
    for panel, values, colours, title in maps:
        panel.imshow(grey, cmap="gray", extent=extent)
        if values.size:
            layer = panel.imshow(values, cmap=colours, alpha=0.65, extent=extent, interpolation="nearest")
            drawing.colorbar(layer, ax=panel, fraction=0.046)
        panel.set_title(title)
    for panel in panels:
        panel.set_axis_off()
    save(drawing, path)
