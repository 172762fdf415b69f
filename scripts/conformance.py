"""Write what runs of a bundle consist of, for hosts in any language to compare with (docs/spec/).

    python scripts/conformance.py demo.bundle --out vectors --steps 20 --height 256 --width 256

The folder holds float32 arrays (`.npy`) and `vectors.json`, which says which is what: token ids, noise, noise levels,
what the model is told of them and the solver's weights, tables, seeded inputs and the outputs of every graph, and for
every policy the decisions, statistics, latent and frames of a whole run. They come from the Python runtime on the CPU.
A bundle of clips takes `--frames` too; a picture is written as a clip of one frame.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from ddit.runtime import Pipeline, Request, shapes
from ddit.runtime.bundle.manifest import Manifest
from ddit.runtime.conditioning.positions import level_tables
from ddit.runtime.conditioning.text import Tokenizer
from ddit.runtime.console import DditCommand, say
from ddit.runtime.errors import DditError, UsageError
from ddit.runtime.policies import Decision, Policy, RunHistory
from ddit.runtime.request import Run
from ddit.runtime.samplers.growing import growing_tables, noise_coefficients, small_noise
from ddit.runtime.samplers.sigmas import noise
from ddit.runtime.samplers.unipc import coefficients as solver_weights
from ddit.runtime.tools.samples import sample_inputs

FORMAT = 2
SCHEDULES = (
    *("native", "fixed", "dynamic", "dynamic:tau=1", "dynamic:tau=1.2,hold=1", "dynamic:tau=1,hold=2+adaptive:0.5"),
    *("adaptive", "adaptive:tolerance=0.3,order=2"),
    *("adams", "taylorseer", "teacache", "spectralcache", "dpcache"),
    *("progressive", "progressive:adaptive,delta=0.2", "progressive+adaptive", "progressive+teacache"),
)


@dataclass(frozen=True)
class Recording(Policy):
    """Another policy, and what it decided."""

    policy: Policy
    decisions: list[Decision] = field(default_factory=list)

    def decide(self, history: RunHistory) -> Decision:
        """The other policy's decision."""
        self.decisions.append(self.policy.decide(history))
        return self.decisions[-1]

    def steps(self, asked: int | None, default: int) -> int:
        """The other policy's."""
        return self.policy.steps(asked, default)

    @property
    def gate(self) -> bool:
        """The other policy's."""
        return self.policy.gate

    def quantile(self) -> float | None:
        """The other policy's."""
        return self.policy.quantile()

    def scales(self) -> Any:
        """The other policy's."""
        return self.policy.scales()

    def describe(self) -> dict[str, object]:
        """The other policy's."""
        return self.policy.describe()

    def __str__(self) -> str:
        return str(self.policy)


class Vectors:
    """The folder that is being written: arrays get a file each, and their place in ``vectors.json`` its name."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def array(self, name: str, values: NDArray[Any]) -> str:
        """Keep an array as float32; returns its file's name."""
        np.save(self.folder / f"{name}.npy", np.ascontiguousarray(values, np.float32))
        return f"{name}.npy"

    def arrays(self, name: str, values: Mapping[str, NDArray[Any]]) -> dict[str, str]:
        """Keep several, by their tensors' names."""
        return {tensor: self.array(f"{name}.{tensor}", value) for tensor, value in values.items()}


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="The folder to write.")
@click.option("--prompt", default="a red circle on a striped background", show_default=True, help="Of all runs.")
@click.option("--seed", type=click.IntRange(0), default=7, show_default=True, help="Of the starting noise.")
@click.option("--steps", type=click.IntRange(3), help="Of every run.  [default: the model's]")
@click.option("--height", type=click.IntRange(1), help="Pixels.  [default: the profile's]")
@click.option("--width", type=click.IntRange(1), help="Pixels.  [default: the profile's]")
@click.option("--frames", type=click.IntRange(1), help="Of a clip.  [default: the profile's]")
@click.option("--schedule", "schedules", multiple=True, help="A policy; again for more.  [default: one of every kind]")
def main(
    bundle: Path,
    out: Path,
    prompt: str,
    seed: int,
    steps: int | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    schedules: tuple[str, ...],
) -> None:
    """Write the conformance vectors of BUNDLE."""
    request = Request(prompt, seed, steps, height=height, width=width, frames=frames)
    content = write_vectors(Pipeline.open(bundle, backend="cpu"), request, schedules or SCHEDULES, out)
    say(f"{out}: {len(content['graphs'])} graphs, {len(content['runs'])} runs")


def write_vectors(pipeline: Pipeline, request: Request, schedules: Sequence[str], folder: Path) -> dict[str, Any]:
    """Write the vectors of runs like ``request`` under several policies; returns what ``vectors.json`` says.

    A policy that the bundle cannot run at this size is left out.
    """
    vectors, manifest = Vectors(folder), pipeline.bundle.manifest
    (run,) = pipeline.resolve([request])
    full = shapes.resolve(manifest.latent.shape, run.sizes)[1:]
    coefficients = noise_coefficients(run.seed, full)
    large = full[-2], full[-1]
    small = large[0] // 2, large[1] // 2
    runs: list[dict[str, Any]] = []
    content: dict[str, Any] = {
        "format": FORMAT,
        "graphs_sha256": {name: manifest.files[info.file].sha256 for name, info in manifest.graphs.items()},
        "prompt": run.prompt,
        "seed": run.seed,
        "steps": run.steps,
        "height": run.size.height,
        "width": run.size.width,
        "frames": run.size.frames,
        "text_length": run.text_length,
        "guidance": run.guidance,
        "carry": run.carry,
        "ids": _ids(pipeline, run.prompt, run.text_length),
        "negative_ids": _ids(pipeline, run.negative_prompt, run.text_length) if run.guided else None,
        "noise": vectors.array("noise", noise(run.seed, full)),
        "coefficients": vectors.array("coefficients", coefficients),
        "small_noise": vectors.array("small_noise", small_noise(coefficients, (*full[:-2], *small))),
        "sigmas": vectors.array("sigmas", run.sigmas),
        "timesteps": vectors.array("timesteps", run.timesteps),
        "solver": _solver(manifest, run, vectors),
        "tables": {
            patch: vectors.arrays(f"level-{patch}", _tables(manifest, patch, run.sizes)) for patch in manifest.patches
        },
        "growing_tables": vectors.arrays("growing", growing_tables(small, large)),
        "graphs": [_graph(pipeline, graph, run.sizes, vectors) for graph in manifest.graphs],
        "runs": runs,
    }
    for number, schedule in enumerate(schedules):
        if schedule == "fixed":  # the levels in turn, the native one first and last
            levels = [*manifest.patches, *manifest.coarse[::-1], manifest.native] * run.steps
            schedule = "fixed:" + ",".join(map(str, levels[: run.steps]))
        try:
            runs.append(_run(pipeline, request, schedule, vectors, f"run-{number}"))
        except UsageError as error:
            say(f"left out: {schedule}: {error}")
    if not runs:
        raise DditError("the bundle can run none of the policies at this size; choose another with --height, --width")
    (folder / "vectors.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return content


def _ids(pipeline: Pipeline, text: str, length: int) -> dict[str, list[int]]:
    """A text's token ids by encoder."""
    return {
        one.graph: Tokenizer(pipeline.bundle.file(one.tokenizer.file), one.tokenizer)(
            text, length if one.free_length else None
        )[0].tolist()
        for one in pipeline.bundle.manifest.encoders
    }


def _solver(manifest: Manifest, run: Run, vectors: Vectors) -> str | None:
    """UniPC's weights (steps, order + 1) in a run that never grows; nothing with Euler's method."""
    if manifest.sampler.kind != "flow_unipc":
        return None
    sigmas, order = run.sigmas.tolist(), manifest.sampler.order
    rows = [solver_weights(sigmas, step, 0, order) for step in range(run.steps)]
    return vectors.array("solver", np.array(rows))


def _tables(manifest: Manifest, patch: int, sizes: Mapping[str, int]) -> dict[str, NDArray[np.float32]]:
    return level_tables(manifest.positions, manifest.latent, manifest.native, patch, sizes)


def _graph(pipeline: Pipeline, graph: str, sizes: Mapping[str, int], vectors: Vectors) -> dict[str, Any]:
    """A graph's seeded inputs and its outputs; token ids as numbers."""
    manifest = pipeline.bundle.manifest
    patch = next((level.patch for level in manifest.levels if level.graph == graph), None)
    tables = _tables(manifest, patch, sizes) if patch else {}
    inputs = sample_inputs(manifest.graphs[graph].inputs, sizes, tables=tables)
    outputs = pipeline.backend.engine(graph).run(inputs)
    return {
        "graph": graph,
        "ids": {name: value[0].tolist() for name, value in inputs.items() if value.dtype == np.int64},
        "inputs": vectors.arrays(f"{graph}.in", {k: v for k, v in inputs.items() if v.dtype != np.int64}),
        "outputs": vectors.arrays(f"{graph}.out", outputs),
    }


def _run(pipeline: Pipeline, request: Request, schedule: str, vectors: Vectors, name: str) -> dict[str, Any]:
    """A whole run: what was decided at every step, on what, and where it led."""
    manifest = pipeline.bundle.manifest
    size = {"height": request.height, "width": request.width, "frames": request.frames}
    recording = Recording(pipeline.policy(schedule, steps=request.steps, **size))
    result = pipeline(
        request.prompt, seed=request.seed, steps=request.steps, schedule=recording, **size  # type: ignore[arg-type]
    )  # fmt: skip
    steps = [
        {
            "step": record.step,
            "sigma": record.sigma,
            "level": record.level,
            "by": record.by,
            "prediction": list(decision.prediction),
            "correction": decision.correction,
            "scale": str(decision.scale),
            "gain": decision.gain,
            "figures": record.figures,
            "statistic": record.statistic,
            "error": record.error,
        }
        for record, decision in zip(result.trace.steps, recording.decisions, strict=True)
    ]
    return {
        "schedule": schedule,
        "policy": str(recording),
        "rho": recording.quantile() or manifest.schedule.rho,
        "steps": steps,
        "latent": vectors.array(f"{name}.latent", result.latent),
        "frames": vectors.array(f"{name}.frames", np.stack([np.asarray(frame) for frame in result.frames])),
    }


if __name__ == "__main__":
    main()
