"""Put a bundle together: graphs, weights, tokenizers, parity and manifest, in a folder that appears all at once."""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.numpy import save_file

from ddit.exporter.families.flux import NATIVE_PATCH, FluxModel
from ddit.exporter.graphs import GraphJob, export_graph
from ddit.exporter.parity import Arrays, check_graph
from ddit.exporter.weights import WeightFiles
from ddit.profiles import Profile
from ddit.runtime.bundle import (
    MANIFEST,
    GraphInfo,
    LevelInfo,
    Manifest,
    ParityResult,
    ScheduleInfo,
    file_info,
)
from ddit.runtime.errors import ModelError, UsageError
from ddit.runtime.verify import REFERENCE_FILE

log = logging.getLogger(__name__)

# The paper's values (arXiv 2602.16968, section 4.1). τ belongs to a model and a step count, so these are a start only.
PAPER = ScheduleInfo(tau=0.001, rho=0.4, warmup=3)
REDUCED_DEPTH = 1  # blocks kept where a graph is checked at reduced depth
MADE_WITH = ("ddit", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")

Report = Callable[[str], None]


def export_bundle(model: FluxModel, out: Path, *, profile: Profile, opset: int, report: Report) -> Manifest:
    """Export a model and write the bundle to ``out``, replacing a bundle that is there.

    Args:
        report: told in a few words what is being done.

    Raises:
        ModelError, ParityError, UsageError: nothing is left behind then, and an older bundle stays as it was.
    """
    with _appearing(out) as folder:
        # first what is quickly done and often wrong
        sampler, tokenizers, jobs = model.sampler, model.save_tokenizers(folder), model.jobs()
        weights = WeightFiles(folder)
        graphs = []
        for job in jobs:
            report(f"tracing {job.name}")
            graphs.append(export_graph(job, opset, weights))
        _check_space(folder, weights.total_bytes())
        report(f"writing {weights.total_bytes() / 1e6:,.0f} MB of weights")
        weights.write()
        infos = {
            graph.job.name: GraphInfo(
                file=graph.save(folder, weights),
                inputs=graph.job.inputs,
                outputs=graph.job.outputs,
                weights=graph.weight_files,
                dtype=graph.job.dtype,
            )
            for graph in graphs
        }
        parity = _check_parity(model, jobs, folder, profile, opset, report)
        report("hashing")
        manifest = Manifest(
            family="flux",
            model=model.source.info,
            dtype=model.dtype,
            opset=opset,
            native=NATIVE_PATCH,
            levels=tuple(_level_info(model, patch) for patch in model.levels),
            graphs=infos,
            profile=profile,
            latent=model.latent,
            tokenizers=tokenizers,
            sampler=sampler,
            rotary=model.rotary,
            guidance=model.guidance,
            schedule=_schedule(model),
            parity=tuple(parity),
            files={path.name: file_info(path) for path in sorted(folder.iterdir())},
            made_with={name: version(name) for name in MADE_WITH},
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def _level_info(model: FluxModel, patch: int) -> LevelInfo:
    adapted = model.adapter is not None and patch in model.adapter.configs
    return LevelInfo(
        patch=patch,
        graph=f"level-{patch}",
        trained=patch == NATIVE_PATCH or adapted,
        adapter_sha256=file_info(model.adapter.path).sha256 if model.adapter and adapted else None,
    )


def _schedule(model: FluxModel) -> ScheduleInfo:
    defaults = model.source.defaults
    return ScheduleInfo(
        tau=defaults.tau or PAPER.tau, rho=defaults.rho or PAPER.rho, warmup=defaults.warmup or PAPER.warmup
    )


def parity_cases(model: FluxModel, profile: Profile) -> list[dict[str, int]]:
    """Two sizes inside the profile: its smallest, and a larger one that is not square, with two samples if it may."""
    entry = profile.entry[0]
    scale = model.latent.downscale
    unit = scale * max(model.levels)

    def above(minimum: int, maximum: int, units: int) -> int:
        lowest = -(-minimum // unit) * unit
        return min(lowest + units * unit, maximum // unit * unit) // scale

    return [
        {
            "B": entry.batch.minimum,
            "H": above(entry.height.minimum, entry.height.maximum, 0),
            "W": above(entry.width.minimum, entry.width.maximum, 0),
            "L": entry.text.minimum,
        },
        {
            "B": min(entry.batch.minimum + 1, entry.batch.maximum),
            "H": above(entry.height.minimum, entry.height.maximum, 1),
            "W": above(entry.width.minimum, entry.width.maximum, 2),
            "L": min(entry.text.minimum + 3, entry.text.maximum),
        },
    ]


def _check_parity(
    model: FluxModel, jobs: list[GraphJob], folder: Path, profile: Profile, opset: int, report: Report
) -> list[ParityResult]:
    """Check every graph, at reduced depth in float32 where this machine cannot run it as it is."""
    cases = parity_cases(model, profile)
    results: list[ParityResult] = []
    kept: Arrays = {}
    here = [job for job in jobs if _runs_here(job)]
    for job in here:
        report(f"checking {job.name} against torch")
        found, arrays = check_graph(job, folder / f"{job.name}.onnx", cases)
        results += found
        kept |= arrays
    if elsewhere := {job.name for job in jobs} - {job.name for job in here}:
        with TemporaryDirectory(prefix="ddit-parity-") as temporary:
            small = replace(model, dtype="fp32", depth=REDUCED_DEPTH)
            weights = WeightFiles(Path(temporary))
            reduced = [export_graph(job, opset, weights) for job in small.jobs() if job.name in elsewhere]
            _check_space(Path(temporary), weights.total_bytes())
            weights.write()
            for graph in reduced:
                report(f"checking {graph.job.name} against torch (float32, reduced depth)")
                graph.save(Path(temporary), weights)
                checked = (
                    f"in float32 with {REDUCED_DEPTH} block of each kind; verify on a machine that runs {model.dtype}"
                )
                found, _ = check_graph(graph.job, Path(temporary) / f"{graph.job.name}.onnx", cases, checked)
                results += found
    save_file(kept, folder / REFERENCE_FILE)
    return results


def _runs_here(job: GraphJob) -> bool:
    """Whether ONNX Runtime's CPU provider has the graph's kernels and the memory holds the model twice in float32."""
    parameters = sum(parameter.numel() for parameter in job.module.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return job.dtype != "bf16" and 2 * 4 * parameters < memory


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ModelError(
            f"not enough disk space: the weights need {needed / 1e9:.1f} GB, "
            f"{folder.parent} has {free / 1e9:.1f} GB free"
        )


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A temporary sibling of ``out`` that takes its place when the block ends well, and vanishes when it does not."""
    if out.exists() and not (out / MANIFEST).is_file():
        raise UsageError(f"{out} exists and is not a bundle; choose another --out")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        partial.mkdir()
        yield partial
        if out.exists():
            out.rename(old)
        partial.rename(out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelError(
                f"no space left on the disk of {out.parent}; free some and run the command again"
            ) from None
        raise ModelError(f"{out} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """Remove what exports of the same bundle left that were killed outright."""
    for path in out.parent.glob(f".{out.name}.partial-*"):
        process = path.name.rpartition("-")[2]
        if not (process.isdecimal() and Path(f"/proc/{process}").exists()):
            shutil.rmtree(path, ignore_errors=True)
