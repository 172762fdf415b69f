"""Put a bundle together: graphs, weights, tokenizers, parity and manifest, in a folder that appears all at once."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from ddit.exporter.end_to_end import check_pipeline
from ddit.exporter.families.base import Family
from ddit.exporter.graphs.job import level_name
from ddit.exporter.graphs.trace import export_graph
from ddit.exporter.graphs.weights import WeightFiles
from ddit.exporter.parity import Report, check_bundle
from ddit.profiles import Profile
from ddit.runtime.backends.artifacts import FOLDER as ENGINES
from ddit.runtime.backends.artifacts import EngineStore
from ddit.runtime.bundle import MANIFEST, Bundle, Manifest, file_info
from ddit.runtime.bundle.manifest import GraphInfo, LevelInfo, ScheduleInfo
from ddit.runtime.errors import ModelError, UsageError

# The paper's values (arXiv 2602.16968, section 4.1). τ belongs to a model and a step count, so these are a start only.
PAPER = ScheduleInfo(tau=0.001, rho=0.4, warmup=3)
CARRY = 0.5  # share of kept detail (docs/method.md); the paper has nothing of the kind
MADE_WITH = ("ddit", "torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


def export_bundle(family: Family, out: Path, *, profile: Profile, opset: int, report: Report) -> Manifest:
    """Export a pipeline and write the bundle to ``out``, replacing a bundle that is there.

    Args:
        report: told in a few words what is being done.

    Raises:
        ModelError, ParityError, UsageError: nothing is left behind then, and an older bundle stays as it was.
    """
    with _appearing(out) as folder:
        # first what takes a moment and often fails
        sampler, encoders, jobs = family.sampler, family.save_tokenizers(folder), family.jobs()
        weights = WeightFiles(folder)
        graphs = []
        for job in jobs:
            report(f"tracing {job.name}")
            graphs.append(export_graph(job, opset, weights))
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
        parity = check_bundle(family, jobs, folder, profile, opset, report)
        parity += check_pipeline(family, jobs, folder, encoders, profile, report)
        report("hashing")
        manifest = Manifest(
            family=family.info.name,
            model=family.source.info,
            dtype=family.dtype,
            opset=opset,
            native=family.native,
            levels=tuple(_level_info(family, patch) for patch in family.levels),
            graphs=infos,
            profile=profile,
            latent=family.latent,
            encoders=encoders,
            sampler=sampler,
            positions=family.positions,
            guidance=family.guidance,
            decoder=family.decoder,
            carry=CARRY if family.source.defaults.carry is None else family.source.defaults.carry,
            schedule=_schedule(family),
            parity=tuple(parity),
            files={path.name: file_info(path) for path in sorted(folder.iterdir())},
            made_with={name: version(name) for name in MADE_WITH},
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    EngineStore(Bundle(out, manifest)).prune()
    return manifest


def _level_info(family: Family, patch: int) -> LevelInfo:
    adapted = family.adapter is not None and patch in family.adapter.configs
    return LevelInfo(
        patch=patch,
        graph=level_name(patch),
        trained=patch == family.native or adapted,
        adapter_sha256=file_info(family.adapter.path).sha256 if family.adapter and adapted else None,
    )


def _schedule(family: Family) -> ScheduleInfo:
    defaults = family.source.defaults
    given = {name: value for name in ScheduleInfo.model_fields if (value := getattr(defaults, name)) is not None}
    known = given["smooth"][0].statistic if "smooth" in given else {}
    if known and not {patch for patch in family.levels if patch != family.native} <= known.keys():
        del given["smooth"], given["tau"]  # the curve lacks a level, and τ is a multiple of the curve
    return PAPER.model_copy(update=given)


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out``, which becomes ``out`` when the block ends and is removed when it fails."""
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
            # an engine's key is made of its graph's content, so that engines of unchanged graphs stay valid
            if (old / ENGINES).is_dir():
                (old / ENGINES).rename(partial / ENGINES)
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
    """Remove the temporary folders of earlier exports to ``out`` that were killed."""
    for path in out.parent.glob(f".{out.name}.partial-*"):
        process = path.name.rpartition("-")[2]
        if not (process.isdecimal() and Path(f"/proc/{process}").exists()):
            shutil.rmtree(path, ignore_errors=True)
