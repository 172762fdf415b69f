"""Time `ddit_host` beside `ddit-run` on one bundle: milliseconds of a step and of a whole process.

    python scripts/compare_hosts.py demo.bundle --host build/cpp/ddit_host --threads 1 --repeat 9

Both make the same picture in processes of their own, in turn, so that what else the machine does touches both alike;
the table has medians. The rest is what a process takes beside its steps: it starts, reads and checks the bundle, opens
graphs, encodes and decodes.
"""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import click
import numpy as np
from rich.table import Table

from ddit.runtime.bundle import Bundle
from ddit.runtime.conditioning.text import Tokenizer
from ddit.runtime.console import DditCommand, terminal
from ddit.runtime.errors import DditError, UsageError
from ddit.runtime.samplers.sigmas import noise

PROMPT, SEED = "a blue cross on a striped background", 7


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", type=click.Path(path_type=Path, dir_okay=False), required=True, help="ddit_host.")
@click.option("--schedule", "schedules", multiple=True, default=("native", "adaptive"), show_default=True)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Of every run.")
@click.option("--backend", type=click.Choice(("cpu", "cuda", "tensorrt")), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of one graph.")
@click.option("--repeat", type=click.IntRange(1), default=9, show_default=True, help="Processes of each kind.")
def main(
    bundle: Path, host: Path, schedules: tuple[str, ...], steps: int, backend: str, threads: int, repeat: int
) -> None:
    """Time both hosts on BUNDLE."""
    if not host.is_file():
        raise UsageError(f"{host} is not there; build it as docs/cpp.md says")
    table = Table("schedule", "host", "computed step, ms", "predicted step, ms", "process, ms", "the rest, ms")
    with TemporaryDirectory() as name:
        folder = Path(name)
        inputs = write_inputs(Bundle.open(bundle), folder)
        options = ("--steps", steps, "--threads", threads, "--trace", folder / "trace.json", "--out", folder / "o.png")
        commands = {
            "C++": (host.resolve(), bundle, *inputs, "--provider", backend, *options),
            "Python": (
                *(sys.executable, "-c", "from ddit.runtime.start import ddit_run; ddit_run()", "generate"),
                *(bundle, PROMPT, "--seed", SEED, "--backend", backend, *options),
            ),
        }
        for schedule in schedules:
            found: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
            for _ in range(repeat):
                for which, command in commands.items():
                    found[which].append(timed([*command, "--schedule", schedule], folder / "trace.json"))
            for which, runs in found.items():
                figures = [median(run[name] for run in runs) for name in runs[0]]
                table.add_row(schedule, which, *(f"{figure:.1f}" for figure in figures))
    terminal().print(table)


def write_inputs(bundle: Bundle, folder: Path) -> Sequence[object]:
    """The prompt's ids and the seed's noise at the bundle's usual size, and the arguments that name them."""
    manifest = bundle.manifest
    encoders = {one.graph: Tokenizer(bundle.file(one.tokenizer.file), one.tokenizer) for one in manifest.encoders}
    ids = {graph: encode(PROMPT)[0].tolist() for graph, encode in encoders.items()}
    (folder / "ids.json").write_text(json.dumps(ids))
    size = manifest.size().by_name()
    sides = [axis.to_latent(size[axis.name]) for axis in manifest.latent.axes]
    np.save(folder / "noise.npy", noise(SEED, (manifest.latent.channels, *sides)))
    return "--ids", folder / "ids.json", "--noise", folder / "noise.npy"


def timed(command: Sequence[object], trace: Path) -> dict[str, float]:
    """Milliseconds of one process and of its parts. Raises `DditError` where it fails."""
    begin = perf_counter()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    process = (perf_counter() - begin) * 1000
    if done.returncode:
        raise DditError(f"{command[0]} failed: {done.stderr.strip().splitlines()[-1:]}")
    content: dict[str, Any] = json.loads(trace.read_text(encoding="utf-8"))
    steps = content["steps"]
    computed = [step["milliseconds"] for step in steps if step["level"] is not None]
    predicted = [step["milliseconds"] for step in steps if step["level"] is None]
    usual = median(computed), median(predicted or [0.0])
    steady = usual[0] * len(computed) + usual[1] * len(predicted)  # the first step of a kind opens its graph
    return {"computed": usual[0], "predicted": usual[1], "process": process, "rest": process - steady}


if __name__ == "__main__":
    main()
