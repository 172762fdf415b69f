"""Time a bundle's single model beside the runtime: seconds of a picture.

    ddit-export single demo.bundle demo.onnx
    python scripts/compare_single.py demo.bundle demo.onnx --repeat 9

Both make the same pictures in one process, in turn, so that what else the machine does touches both alike; the first
ones, in which graphs are opened and memory is found, do not count. The table has medians.
"""

from pathlib import Path
from statistics import median
from time import perf_counter

import click
import numpy as np
from rich.table import Table

from ddit.exporter.single.check import noise_input, text_inputs, typed
from ddit.exporter.single.defaults import find_defaults
from ddit.runtime import Pipeline
from ddit.runtime.backends.onnxruntime.host import open_session
from ddit.runtime.console import DditCommand, terminal
from ddit.runtime.errors import UsageError

PROMPT, SEED = "a blue cross on a striped background", 7
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("model", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--schedule", "schedules", multiple=True, default=("native", "adaptive", "dynamic"), show_default=True)
@click.option("--backend", type=click.Choice(list(PROVIDERS)), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Of one graph.  [default: all cores]")
@click.option("--repeat", type=click.IntRange(1), default=9, show_default=True, help="Pictures of each kind.")
def main(bundle: Path, model: Path, schedules: tuple[str, ...], backend: str, threads: int | None, repeat: int) -> None:
    """Time BUNDLE in the runtime beside its single MODEL."""
    if not model.is_file():
        raise UsageError(f"{model} is not there; write it with ddit-export single")
    pipeline = Pipeline.open(bundle, backend=backend, threads=threads)
    begin = perf_counter()
    # with weights in the order that products read fastest, as the runtime has them for a small model
    session = open_session(model, PROVIDERS[backend], threads, prepack=True)
    opening = perf_counter() - begin
    manifest = pipeline.bundle.manifest
    size = manifest.size()
    given = text_inputs(pipeline.bundle, PROMPT) | noise_input(manifest, SEED, height=size.height, width=size.width)
    table = Table("schedule", "steps computed", "runtime, s", "single, s", "largest difference of a pixel")
    table.caption = f"opening the single model: {opening:.2f} s"
    for schedule in schedules:
        defaults = find_defaults(manifest, schedule, backend=backend)
        names = (
            "steps",
            "levels",
            "tolerance",
            "order",
            *(("tau", "rho", "warmup", "hold") if manifest.coarse else ()),
        )
        inputs = typed(session, given | {name: getattr(defaults, name) for name in names})
        times = []
        for _ in range(repeat + 1):
            begin = perf_counter()
            expected = pipeline(PROMPT, seed=SEED, schedule=schedule)
            between = perf_counter()
            image, _ = session.run(["image", "level"], inputs)
            times.append((between - begin, perf_counter() - between))
        runtime, single = (median(column) for column in zip(*times[1:], strict=True))
        difference = abs(image.astype(int) - np.asarray(expected.image)).max()
        computed = f"{len(expected.trace.steps) - expected.trace.predicted} of {len(expected.trace.steps)}"
        table.add_row(schedule, computed, f"{runtime:.3f}", f"{single:.3f}", f"{difference}/255")
    terminal().print(table)


if __name__ == "__main__":
    main()
