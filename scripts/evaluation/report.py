"""What `evaluate.py` writes: results.csv, pictures.csv, report.md, plot.png and grid.png."""

import csv
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO, StringIO
from math import isnan, nan
from pathlib import Path
from platform import python_version
from statistics import median

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from evaluation.bootstrap import CONFIDENCE, RESAMPLES, Estimate, estimate, estimate_ratio
from evaluation.metrics import PSNR_CAP, Metric, Sample
from evaluation.store import Record, Settings, Store, write_whole

PACKAGES = ("ddit", "onnxruntime", "torch", "numpy", "scipy", "scikit-image", "torchmetrics", "transformers")
GRID_PROMPTS, GRID_SIDE, GRID_CAPTION = 6, 192, 18
COLOURS, MARKERS = 10, "os^D"  # matplotlib's colours begin anew after so many; other markers tell them apart
GRID_FRAMES = 3  # of a clip
Cell = str | int | float | Estimate
Row = dict[str, Cell]


@dataclass(frozen=True)
class Measured:
    """A schedule's pictures in the order of the samples."""

    schedule: str
    records: list[Record]
    values: dict[str, list[float]]  # of paired and absolute metrics, and of what these show beside
    distances: dict[str, float]  # of distribution metrics


@dataclass(frozen=True)
class Facts:
    """What the report says about the run."""

    bundle: str
    prompts: str
    seeds: int
    settings: Settings
    flops: Mapping[int, float]  # of a step, by level
    smaller: Mapping[tuple[int, int], Mapping[int, float]]  # the same at every smaller size in pixels that steps ran at
    native: int
    skipped: Sequence[str]
    floors: Mapping[str, float]  # distances of perfect pictures
    against: Path | None = None  # the folder whose native pictures are compared with, where it is another one


def write_report(
    out: Path,
    store: Store,
    measured: Sequence[Measured],
    samples: Sequence[Sample],
    metrics: Sequence[Metric],
    facts: Facts,
) -> None:
    """Write all five files. The first schedule is the native one."""
    rows = [summarize(one, measured[0], samples, metrics, facts) for one in measured]
    write_whole(out / "results.csv", to_csv([flat(row) for row in rows]))
    write_whole(out / "pictures.csv", to_csv(picture_rows(out, store, measured, samples, facts)))
    write_whole(out / "report.md", markdown(rows, samples, metrics, facts, store.steps).encode())
    write_whole(out / "plot.png", plot(rows, metrics))
    write_whole(out / "grid.png", grid(store, measured, samples))


# ---- figures ----


def coarse_shares(measured: Measured, native: int) -> list[float]:
    """Share of every picture's steps that ran above the native level."""
    return [
        sum(level not in (native, None) for level in record.levels) / len(record.levels) for record in measured.records
    ]


def kinds(samples: Sequence[Sample]) -> list[str]:
    """The kinds of scenes or clips that there are, in their order."""
    return list(dict.fromkeys(sample.kind for sample in samples if sample.kind))


def computed(measured: Measured, facts: Facts) -> list[float]:
    """Operations of every picture's transformer steps: the sum of their levels' (see `flops.level_flops`)."""
    return [
        sum(_at_size(record, step, facts)[level] for step, level in enumerate(record.levels) if level is not None)
        for record in measured.records
    ]


def _at_size(record: Record, step: int, facts: Facts) -> Mapping[int, float]:
    """Operations of a step by level, at the size that it ran at."""
    height, width = record.smaller.get(str(step), (0, 0))
    return facts.smaller[height, width] if height else facts.flops


def summarize(
    one: Measured, native: Measured, samples: Sequence[Sample], metrics: Sequence[Metric], facts: Facts
) -> Row:
    """A schedule's row: means over prompts, totals for speed-ups, each with its interval where it has one."""
    seeds = facts.seeds
    shares = coarse_shares(one, facts.native)
    row: Row = {"schedule": one.schedule, "pictures": len(samples), "coarse_share": estimate(shares, seeds)}
    for kind in kinds(samples):
        chosen = [share for share, sample in zip(shares, samples, strict=True) if sample.kind == kind]
        row[share_column(kind)] = estimate(chosen, seeds)
    row["compute_speedup"] = estimate_ratio(computed(native, facts), computed(one, facts), seeds)
    native_times, times = ([record.milliseconds for record in which.records] for which in (native, one))
    row["wall_speedup"] = estimate_ratio(native_times, times, seeds)
    row["milliseconds"] = median(times)
    for metric in metrics:
        if metric.name in one.values:
            values = one.values[metric.name]
            row[metric.name] = estimate(values, seeds)
            if metric.kind == "absolute" and one is not native:
                difference = np.subtract(values, native.values[metric.name])
                row[f"{metric.name}_minus_native"] = estimate(difference, seeds)
        if metric.name in one.distances:
            row[metric.name] = one.distances[metric.name]
            if metric.name in native.distances:
                row[f"{metric.name}_share"] = one.distances[metric.name] / native.distances[metric.name]
    return row


# ---- tables ----


def flat(row: Row) -> dict[str, str | int | float]:
    """An estimate as three columns: ``name``, ``name_low`` and ``name_high``."""
    out: dict[str, str | int | float] = {}
    for name, cell in row.items():
        if isinstance(cell, Estimate):
            out |= {name: cell.value, f"{name}_low": cell.low, f"{name}_high": cell.high}
        else:
            out[name] = cell
    return out


def to_csv(rows: Sequence[Mapping[str, str | int | float]]) -> bytes:
    """Rows as CSV; a column that a row lacks stays empty there."""
    text = StringIO()
    writer = csv.DictWriter(text, columns(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue().encode()


def columns(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Every column of any row: those of the fullest row, in its order, then the others."""
    fullest = max(rows, key=len)
    return list(dict.fromkeys([*fullest, *(name for row in rows for name in row)]))


def picture_rows(
    out: Path, store: Store, measured: Sequence[Measured], samples: Sequence[Sample], facts: Facts
) -> list[dict[str, str | int | float]]:
    """A row a picture: how it was made and what was measured in it."""
    rows: list[dict[str, str | int | float]] = []
    for one in measured:
        shares, compute = coarse_shares(one, facts.native), computed(one, facts)
        for i, sample in enumerate(samples):
            rows.append(
                {
                    "schedule": one.schedule,
                    "prompt": sample.prompt,
                    "seed": sample.seed,
                    "kind": sample.kind,
                    "file": str(store.picture_file(one.schedule, sample).relative_to(out)),
                    "coarse_share": shares[i],
                    "tflop": compute[i] / 1e12,
                    "milliseconds": one.records[i].milliseconds,
                    **{name: values[i] for name, values in one.values.items()},
                }
            )
    return rows


TITLES = {
    "schedule": "schedule",
    "coarse_share": "coarse steps",
    "compute_speedup": "compute",
    "wall_speedup": "wall clock",
    "milliseconds": "ms",
}
PERCENT = ("coarse_share", "adherence")
SHARE = "_share"
TIMES = "_speedup"
DIFFERENCE = "_minus_native"


def share_column(kind: str) -> str:
    """The column of a kind's coarse steps: ``still, plain`` → ``coarse_share_still_plain``."""
    return f"coarse_share_{kind.replace(', ', '_')}"


def titles(metrics: Sequence[Metric], samples: Sequence[Sample], noun: str) -> dict[str, str]:
    """Column → heading of the Markdown table. ``noun``: what is made, scenes or clips."""
    found = {**TITLES, **{share_column(kind): f"{kind} {noun}" for kind in kinds(samples)}}
    for metric in metrics:
        found[metric.name] = f"{metric.title} {'↑' if metric.better == 'higher' else '↓'}"
        found[metric.name + DIFFERENCE] = "− native"
        found[metric.name + SHARE] = "÷ native"
    return found


def show(name: str, cell: Cell | None) -> str:
    """A cell of the Markdown table, its interval in brackets."""
    if cell is None:
        return "–"
    if isinstance(cell, str | int):
        return str(cell)
    if not isinstance(cell, Estimate):
        cell = Estimate(cell, nan, nan)

    scale, unit, form = 1.0, "", ".4g"
    if name.startswith(PERCENT):
        scale, unit, form = 100.0, " %", ".1f"
    elif name.endswith((TIMES, SHARE)):
        unit, form = "×", ".2f"
    if name.endswith(DIFFERENCE):
        form = "+" + form
    value, low, high = (f"{scale * part:{form}}" for part in (cell.value, cell.low, cell.high))
    return f"{value}{unit}" if isnan(cell.low) else f"{value}{unit} [{low}, {high}]"


def markdown(
    rows: Sequence[Row], samples: Sequence[Sample], metrics: Sequence[Metric], facts: Facts, steps: int
) -> str:
    """The report: the table, what its columns are, and what the run was."""
    headings = titles(metrics, samples, "clips" if facts.settings.frames else "scenes")
    shown = [name for name in columns(rows) if name in headings]
    table = [
        "| " + " | ".join(headings[name] for name in shown) + " |",
        "|" + "---|" * len(shown),
        *("| " + " | ".join(show(name, row.get(name)) for name in shown) + " |" for row in rows),
    ]
    settings, native = facts.settings, facts.flops[facts.native]
    prompts = len({sample.prompt_number for sample in samples})
    levels = ", ".join(f"level {level}: {value / 1e9:.4g} GFLOP" for level, value in facts.flops.items())
    notes = [
        f"Intervals are {CONFIDENCE:.0%} percentile bootstrap intervals over the prompts ({RESAMPLES} resamples).",
        "*coarse steps* is the mean share of steps above the native level.",
        "*compute* is native's operations over the schedule's, all pictures together, in the transformer: "
        f"matrix products, convolutions and attention, counted in the graphs; a step at {levels} "
        + "("
        + ", ".join(f"{native / value:.2f}×" for value in facts.flops.values())
        + ").",
        "*wall clock* is native's milliseconds over the schedule's, all pictures together, without text encoders and "
        "decoder; *ms* is the schedule's median.",
    ]
    if settings.frames:
        notes.append("A clip's metrics are means over its frames.")
    if settings.batch > 1:
        notes.append(f"Pictures were made {settings.batch} at a time; milliseconds are a picture's share of its batch.")
    names = {metric.name for metric in metrics}
    if "psnr" in names:
        notes.append(f"An identical picture counts as {PSNR_CAP:g} dB.")
    if "adherence" in names:
        notes.append(
            "*adherence*: the scene classifier sees exactly the shapes, the colours and the background of the prompt; "
            "*− native* is the paired difference."
        )
    for metric in metrics:
        if metric.kind == "distribution" and metric.name in facts.floors:
            notes.append(
                f"*{metric.title}* is the distance to rendered scenes of the same kind. Rendered scenes of these very "
                f"prompts, perfect pictures, are at {facts.floors[metric.name]:.4g}: the floor at this number of "
                "pictures. *÷ native* is the share of native's own distance."
            )
        elif metric.kind == "distribution":
            notes.append(f"*{metric.title}* is the distance to the native pictures.")
    if facts.against:
        notes.append(f"Pictures are compared one by one with the native ones in `{facts.against}`.")
    run = [
        f"bundle: {facts.bundle} (bundle.json {settings.bundle[:12]})",
        f"pictures: {prompts} prompts ({facts.prompts}), {facts.seeds} of each under every schedule; {steps} steps, "
        f"{settings.size} pixels, guidance {settings.guidance:g}, carry {settings.carry:g}",
        f"machine: {settings.machine}; backend {settings.backend}, threads {settings.threads or 'all'}",
        "versions: " + ", ".join([f"Python {python_version()}", *(f"{n} {v}" for n, v in versions().items())]),
        f"command: `{shlex.join(['python', *sys.argv])}`",
    ]
    parts = [
        "# Schedules against native",
        "\n".join(table),
        "\n".join(f"* {note}" for note in notes),
        "![quality against speed](plot.png)\n\n![pictures](grid.png)",
        "## The run",
        "\n".join(f"* {fact}" for fact in run),
    ]
    if facts.skipped:
        parts += ["## Not measured", "\n".join(f"* {line}" for line in facts.skipped)]
    return "\n\n".join(parts) + "\n"


def versions() -> dict[str, str]:
    """Versions of what made the numbers, as far as it is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


# ---- pictures ----


def plot(rows: Sequence[Row], metrics: Sequence[Metric]) -> bytes:
    """Every metric against both speed-ups, as PNG; bars are the intervals."""
    figure = Figure(figsize=(10, max(1, len(metrics)) * 3.2), layout="constrained")
    panels = figure.subplots(max(1, len(metrics)), 2, sharey="row", sharex="col", squeeze=False)
    for line, metric in zip(panels, metrics, strict=False):
        for panel, speed in zip(line, ("compute_speedup", "wall_speedup"), strict=True):
            for number, row in enumerate(rows):
                x, y = row[speed], row.get(metric.name)
                if y is None or not isinstance(x, Estimate):
                    continue
                y = y if isinstance(y, Estimate) else Estimate(float(y), nan, nan)
                marker = MARKERS[number // COLOURS % len(MARKERS)]
                style = {"marker": marker, "capsize": 2, "color": f"C{number}", "label": row["schedule"]}
                panel.errorbar(x.value, y.value, xerr=_bars(x), yerr=_bars(y), **style)
            panel.grid(alpha=0.3)
        line[0].set_ylabel(f"{metric.title}\n({metric.better} is better)", fontsize=9)
    for panel, title in zip(panels[-1], ("compute", "wall-clock"), strict=True):
        panel.set_xlabel(f"{title} speed-up over native")
    named = {label: bar for panel in panels.flat for bar, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside upper left", ncols=2, fontsize=8)
    content = BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _bars(one: Estimate) -> list[list[float]] | None:
    """Lengths of an error bar below and above its point."""
    if isnan(one.low):
        return None
    return [[max(0.0, one.value - one.low)], [max(0.0, one.high - one.value)]]


def grid(store: Store, measured: Sequence[Measured], samples: Sequence[Sample]) -> bytes:
    """The first prompts, a row each, under every schedule, a column each, as PNG.

    A clip is shown by its first, its middle and its last frame, side by side.
    """
    firsts: dict[int, Sample] = {}
    for sample in samples:
        firsts.setdefault(sample.prompt_number, sample)
    chosen = list(firsts.values())[:GRID_PROMPTS]
    shown = np.linspace(0, store.frames - 1, min(store.frames, GRID_FRAMES)).round().astype(int)
    rows = [[np.hstack(store.read(one.schedule, sample)[shown]) for sample in chosen] for one in measured]
    height, width = rows[0][0].shape[:2]
    scale = GRID_SIDE / max(height, width // len(shown))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    step = (size[0] + 4, size[1] + GRID_CAPTION)
    sheet = Image.new("RGB", (step[0] * len(measured), GRID_CAPTION + step[1] * len(chosen)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (one, pictures) in enumerate(zip(measured, rows, strict=True)):
        draw.text((column * step[0] + 2, 2), one.schedule[: size[0] // 6], fill="black")
        for line, picture in enumerate(pictures):
            sheet.paste(
                Image.fromarray(picture).resize(size), (column * step[0], GRID_CAPTION + line * step[1] + GRID_CAPTION)
            )
    for line, sample in enumerate(chosen):
        draw.text((2, GRID_CAPTION + line * step[1] + 2), sample.prompt[: sheet.width // 6], fill="black")
    content = BytesIO()
    sheet.save(content, format="PNG")
    return content.getvalue()
