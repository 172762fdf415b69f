"""Plots of runs. They need matplotlib, which the runtime does without otherwise: ``pip install 'ddit[plot]'``."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddit.runtime.complexity import Complexity
from ddit.runtime.console import printable
from ddit.runtime.errors import UsageError
from ddit.runtime.trace import Trace

LONGEST_TITLE = 100  # characters
MOST_ROWS = 4  # of a clip's map

FloatArray = NDArray[np.float32]


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


def plot_complexity(frames: Sequence[Image.Image], complexity: Complexity, path: Path) -> None:
    """Lay where and when over the picture, side by side; of a clip over some of its frames, one below the other."""
    where, when = complexity.where(), complexity.when()
    rows = _map_rows(frames, where, when)
    drawing, (width, height) = figure(), frames[0].size
    drawing.set_size_inches(12, (12 / 3 * height / width) * len(rows) + 0.9)
    grid = drawing.subplots(len(rows), 3, squeeze=False)
    extent = (0, width, height, 0)
    titles = ("where: detail, as a share of the mean", "when: mean step of the detail")
    colours = ("inferno", "viridis")
    for panels, (name, image, *maps) in zip(grid, rows, strict=True):
        grey = np.asarray(image.convert("L"))
        panels[0].imshow(image)
        panels[0].set_title(name)
        for panel, values, whole, colour, title in zip(panels[1:], maps, (where, when), colours, titles, strict=True):
            panel.imshow(grey, cmap="gray", extent=extent)
            if values.size:
                scale = {"vmin": float(whole.min()), "vmax": float(whole.max())}  # one for all rows
                layer = panel.imshow(values, cmap=colour, alpha=0.65, extent=extent, interpolation="nearest", **scale)
                drawing.colorbar(layer, ax=panel, fraction=0.046)
            panel.set_title(title)
        for panel in panels:
            panel.set_axis_off()
    save(drawing, path)


def _map_rows(
    frames: Sequence[Image.Image], where: FloatArray, when: FloatArray
) -> list[tuple[str, Image.Image, FloatArray, FloatArray]]:
    """What every row of a map shows: its name, the frame, and the values over it."""
    if where.ndim == 2:
        return [("picture", frames[0], where, when)]
    chosen = sorted(set(np.linspace(0, len(where) - 1, MOST_ROWS).round().astype(int).tolist()))
    apart = (len(frames) - 1) / max(len(where) - 1, 1)  # frames from one of the latent to the next
    places = [round(number * apart) for number in chosen]
    return [
        (f"frame {place}", frames[place], where[number], when[number])
        for number, place in zip(chosen, places, strict=True)
    ]
