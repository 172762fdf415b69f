"""Put a bundle together: graphs, weights, tokenizers, parity and manifest, in a folder that appears all at once."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from ddit.exporter.end_to_end import check_pipeline
from ddit.exporter.families.base import Family
from ddit.exporter.graphs.job import level_name
from ddit.exporter.graphs.rewrite import BACKEND, Twin, write_twin
from ddit.exporter.graphs.rewrite import OPSET as TWINS_SINCE
from ddit.exporter.graphs.trace import export_graph
from ddit.exporter.graphs.weights import WeightFiles
from ddit.exporter.parity import Report, check_bundle
from ddit.exporter.replacing import replacing
from ddit.profiles import Profile
from ddit.runtime.bundle import MANIFEST, Manifest, file_info
from ddit.runtime.bundle.manifest import AdaptiveInfo, GraphInfo, LevelInfo, ParityResult, ScheduleInfo
from ddit.runtime.policies import DIFFERENCE_ORDER

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
    with replacing(out) as folder:
        # first what takes a moment and often fails
        sampler, encoders, jobs = family.sampler, family.save_tokenizers(folder), family.jobs()
        weights = WeightFiles(folder)
        graphs = []
        for job in jobs:
            report(f"tracing {job.name}")
            graphs.append(export_graph(job, opset, weights))
        report(f"writing {weights.total_bytes() / 1e6:,.0f} MB of weights")
        weights.write()
        files = {graph.job.name: graph.save(folder, weights) for graph in graphs}
        levels = {level_name(patch) for patch in family.levels} if opset >= TWINS_SINCE else set()
        twins = {name: write_twin(folder / file) for name, file in files.items() if name in levels}
        parity = check_bundle(family, jobs, folder, profile, opset, report, twins)
        infos = {
            graph.job.name: GraphInfo(
                file=files[graph.job.name],
                inputs=graph.job.inputs,
                outputs=graph.job.outputs,
                weights=graph.weight_files,
                dtype=graph.job.dtype,
                twins=_accepted_twin(folder, graph.job.name, twins.get(graph.job.name), parity, report),
            )
            for graph in graphs
        }
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
            gate=family.gate,
            carry=CARRY if family.source.defaults.carry is None else family.source.defaults.carry,
            schedule=_schedule(family),
            adaptive=AdaptiveInfo(),
            spectrum=family.source.defaults.spectrum or family.spectrum,
            parity=tuple(parity),
            files={path.name: file_info(path) for path in sorted(folder.iterdir())},
            made_with={name: version(name) for name in MADE_WITH},
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def _accepted_twin(
    folder: Path, name: str, twin: Twin | None, parity: Sequence[ParityResult], report: Report
) -> dict[str, str]:
    """The twin of a graph that agrees with the model, by its backend; another one's file is removed."""
    if twin is None:
        return {}
    if twin.file and any(result.graph == name and result.twin for result in parity):
        return {BACKEND: twin.file}
    if twin.file:
        (folder / twin.file).unlink()
    report(f"warning: {name}: {next(result.note for result in parity if result.graph == name)}")
    return {}


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
    if family.sampler.kind == "flow_unipc":
        # a step looks at so many estimates before it, and a switch of level shows in the statistic that much longer
        given = {"hold": DIFFERENCE_ORDER + family.sampler.order, **given}
    return PAPER.model_copy(update=given)
