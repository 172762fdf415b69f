"""Twins for ONNX Runtime on CUDA: what they are made of, and that they compute what diffusers does."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import FluxTransformer2DModel
from onnxscript.rewriter import MatchResult, RewritePass

from conftest import run
from ddit.exporter.cli import main
from ddit.exporter.families.flux.model import Flux
from ddit.exporter.families.flux.original import native_velocity
from ddit.exporter.graphs import rewrite
from ddit.exporter.graphs.rewrite import write_twin
from ddit.runtime import Bundle
from ddit.runtime.backends.onnxruntime.host import OnnxRuntimeEngine, open_session
from ddit.runtime.conditioning.positions import level_tables
from ddit.runtime.tools.samples import sample_inputs
from ddit.runtime.tools.verify import relative_error
from tiny import half_precision_level

BLOCKS = 3  # of the tiny transformer: one double, two single
DOUBLE = 1


def between(value: ir.Value | None, ends: set[str]) -> set[str]:
    """The operators on the way from a value back to matrix products or the graph's inputs."""
    node = None if value is None else value.producer()
    if node is None or node.op_type in ends:
        return set()
    return {node.op_type}.union(*(between(before, ends) for before in node.inputs))


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_what_the_first_stage_makes(tiny_bundle, monkeypatch, patch):
    monkeypatch.setattr(rewrite, "fuse", lambda model: None)
    model = ir.load(tiny_bundle / f"level-{patch}.onnx")
    standard = Counter(node.op_type for node in model.graph)
    rewrite.rewrite(model)
    twin = Counter(node.op_type for node in model.graph)
    assert (standard["Attention"], twin["Attention"], twin["MultiHeadAttention"]) == (BLOCKS, 0, BLOCKS)
    assert (standard["Neg"], twin["Neg"], twin["RotaryEmbedding"]) == (2 * BLOCKS, 0, 2 * BLOCKS)
    assert standard["Gelu"] == twin["FastGelu"] == BLOCKS + DOUBLE
    assert twin["Gelu"] == 0
    assert standard["Transpose"] - twin["Transpose"] == 4 * BLOCKS
    assert twin["Transpose"] == 2  # into patches and back
    # a norm with its scale and shift is one node: two multiplications and additions of every block's norms are gone
    assert standard["LayerNormalization"] == twin["LayerNormalization"]
    assert twin.total() < 0.75 * standard.total()


@pytest.mark.parametrize("patch", [2, 4])
def test_nothing_is_transposed_between_projections_and_attention(tiny_bundle, patch):
    graph = ir.load(tiny_bundle / f"level-{patch}.cuda.onnx").graph
    attentions = [node for node in graph if node.op_type == "MultiHeadAttention"]
    for node in attentions:
        for value in node.inputs:
            on_the_way = between(value, {"MatMul", "Gemm"})
            # the biases and what the second stage puts there; else only what makes the tables
            assert on_the_way <= {"Add", "JoinedBias", "BiasNormRotary", "JoinedBiasNormRotary", "Concat", "Slice",
                                  "Reshape", "Shape", "Squeeze", "Mul", "Expand", "ConstantOfShape"}  # fmt: skip
        (output,) = node.outputs
        assert {user.op_type for user, _ in output.uses()} <= {"Split", "JoinedBiasGelu", "JoinedBiasGeluWithBranch"}


def test_half_precision_goes_through_no_float32(tiny_pipeline, tmp_path):
    """But for the tables, which stay in float32, the noise level's sinusoids, and the graph's edges."""
    path = half_precision_level(tiny_pipeline, tmp_path)
    twin = write_twin(path)
    graph = ir.load(tmp_path / twin.file).graph
    casts = [node for node in graph if node.op_type == "Cast"]
    to_float32 = [node for node in casts if node.attributes["to"].value == ir.DataType.FLOAT]
    assert [node.outputs[0].name for node in to_float32] == ["velocity"]
    assert len(casts) == 6  # three inputs, two embeddings, the velocity
    assert sum(node.op_type == "Cast" for node in ir.load(path).graph) == 6 + 3 * 2 * BLOCKS
    # diffusers clips what overflows float16
    assert {node.op_type for node in graph}.isdisjoint({"Clip", "Max", "Min"})
    limits = [node.attributes.get_float("limit") for node in graph if "limit" in node.attributes]
    assert limits == [np.finfo(np.float16).max] * BLOCKS


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{"B": 1, "H": 16, "W": 16, "L": 8}, {"B": 2, "H": 24, "W": 16, "L": 11}])
def test_a_twin_computes_what_diffusers_does(tiny_bundle, tiny_pipeline, sizes):
    """Two samples have noise levels of their own, so each has its own row of scales and shifts."""
    manifest = Bundle.open(tiny_bundle).manifest
    info = manifest.graphs["level-2"]
    tables = level_tables(manifest.positions, manifest.latent, manifest.native, 2, sizes)
    inputs = sample_inputs(info.inputs, sizes, seed=5, tables=tables)
    original = native_velocity(FluxTransformer2DModel.from_pretrained(tiny_pipeline / "transformer").eval())
    expected = original(**{name: torch.from_numpy(value) for name, value in inputs.items()}).numpy()
    twin = OnnxRuntimeEngine(open_session(tiny_bundle / info.twins["cuda"]), "the twin", info)
    assert relative_error(twin.run(inputs)["velocity"], expected) < 1e-5


@pytest.mark.parametrize("patch", [2, 4])
def test_half_precision_s_twin_is_as_near_to_float32_as_the_graph(tiny_pipeline, tiny_bundle, tmp_path, patch):
    """Rounded tables do not show beside the rounding of everything else."""
    path = half_precision_level(tiny_pipeline, tmp_path)
    twin = write_twin(path)
    manifest = Bundle.open(tiny_bundle).manifest
    info, sizes = manifest.graphs["level-2"], {"B": 2, "H": 24, "W": 16, "L": 11}
    tables = level_tables(manifest.positions, manifest.latent, manifest.native, 2, sizes)
    inputs = sample_inputs(info.inputs, sizes, seed=patch, tables=tables)
    exact = OnnxRuntimeEngine(open_session(tiny_bundle / info.file), "float32").run(inputs)["velocity"]
    errors = [
        relative_error(OnnxRuntimeEngine(open_session(file), "half").run(inputs)["velocity"], exact)
        for file in (path, tmp_path / twin.file)
    ]
    assert max(errors) < 2e-3
    assert errors[1] < 1.5 * errors[0]


def test_the_weights_lie_where_they_lay(tiny_bundle, tmp_path):
    """A twin names the same tensors of the same files, so that sessions go on sharing them; nothing is written."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "copy.bundle")
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in bundle.glob("*.safetensors")}
    (bundle / "level-4.cuda.onnx").unlink()
    # they are not even read: a real model's are tens of gigabytes
    for path in bundle.glob("*.safetensors"):
        path.rename(path.with_suffix(".away"))
    assert write_twin(bundle / "level-4.onnx").file == "level-4.cuda.onnx"
    for path in bundle.glob("*.away"):
        path.rename(path.with_suffix(".safetensors"))
    assert {path.name: hashlib.sha256(path.read_bytes()).digest() for path in bundle.glob("*.safetensors")} == before

    def places(file: Path) -> dict[str, tuple]:
        tensors = [value.const_value for value in ir.load(file).graph.initializers.values()]
        return {
            one.name: (one.location, one.offset, one.length) for one in tensors if isinstance(one, ir.ExternalTensor)
        }

    found = places(bundle / "level-4.cuda.onnx")
    assert found == places(bundle / "level-4.onnx")
    assert {file for file, *_ in found.values()} == {"transformer.safetensors", "level-4.safetensors"}
    assert (bundle / "level-4.cuda.onnx").stat().st_size < 200_000


def test_the_bundle_holds_twins_of_its_levels(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest
    for name, info in manifest.graphs.items():
        expected = {"cuda": f"{name}.cuda.onnx"} if name.startswith("level-") else {}
        assert info.twins == expected
        assert set(expected.values()) <= manifest.files.keys()
        results = [result for result in manifest.parity if result.graph == name and result.twin == "cuda"]
        assert len(results) == 2 * len(expected)
        assert all(result.checked == "full" and 0 < result.error < 1e-5 for result in results)


def test_older_opsets_have_none(opset17_bundle):
    manifest = Bundle.open(opset17_bundle).manifest
    assert not any(info.twins for info in manifest.graphs.values())
    assert not any(result.twin or result.note for result in manifest.parity)


@pytest.fixture
def only_the_level(monkeypatch) -> None:
    """Export the native level alone."""
    jobs = Flux.jobs
    monkeypatch.setattr(Flux, "jobs", lambda flux: [job for job in jobs(flux) if job.name == "level-2"])
    monkeypatch.setattr("ddit.exporter.build.check_pipeline", lambda *_: [])
    monkeypatch.setattr("ddit.runtime.bundle.manifest.check_manifest", lambda _: None)  # the others are missing


def test_a_branch_s_scale_of_1_goes():
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["": 23]>
        scaled (float[B, 8] x) => (float[B, 8] once, float[B, 8] twice)
        <float one = {1}, float two = {2}> { once = Mul(x, one) twice = Mul(x, two) }"""
    )
    RewritePass([rewrite.TimesOne.rule()])(model)
    assert [node.op_type for node in model.graph] == ["Identity", "Mul"]


def turn_the_other_way(monkeypatch) -> None:
    usual = rewrite.Rotary.rewrite
    monkeypatch.setattr(
        rewrite.Rotary, "rewrite", lambda rule, op, cos, sin, **rest: usual(rule, op, cos=sin, sin=cos, **rest)
    )


def know_no_attention(monkeypatch) -> None:
    monkeypatch.setattr(rewrite.Attention, "check", lambda *_, **__: MatchResult().fail("nothing is known"))


def name_what_nobody_has(monkeypatch) -> None:
    monkeypatch.setattr(rewrite, "CONTRIB", "com.nobody")


@pytest.mark.usefixtures("only_the_level")
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (turn_the_other_way, "the cuda twin of level-2 does not compute what the model computes"),
        (know_no_attention, f"{BLOCKS} of its {BLOCKS} attentions are unlike those that can be rewritten"),
        (name_what_nobody_has, "could not load level-2.cuda.onnx"),
    ],
)
def test_without_a_right_twin_the_graph_itself_is_exported(tiny_pipeline, tmp_path, monkeypatch, spoil, words):
    spoil(monkeypatch)
    out = tmp_path / "out.bundle"
    options = ("--levels", "2", "--dtype", "fp32", "--profile", "256", "--out", out)
    result = run(main, "flux", "--model", tiny_pipeline, *options)
    assert result.exit_code == 0, result.stderr
    assert "level-2: cuda runs the graph itself: " in result.stderr
    assert words in " ".join(result.stderr.split())
    assert [path.name for path in sorted(out.glob("*.onnx"))] == ["level-2.onnx"]
    manifest = json.loads((out / "bundle.json").read_text())
    assert manifest["graphs"]["level-2"]["twins"] == {}
    assert "level-2.cuda.onnx" not in manifest["files"]
    for entry in manifest["parity"]:
        assert (entry["twin"], entry["checked"]) == (None, "full")
        assert words in entry["note"]


@pytest.mark.usefixtures("only_the_level")
def test_a_twin_that_this_machine_cannot_run_is_checked_in_float32(tiny_pipeline, tmp_path):
    out = tmp_path / "out.bundle"
    options = ("--levels", "2", "--dtype", "bf16", "--profile", "256", "--out", out)
    result = run(main, "flux", "--model", tiny_pipeline, *options)
    assert result.exit_code == 0, result.stderr
    parity = json.loads((out / "bundle.json").read_text())["parity"]
    (twin, *_) = [entry for entry in parity if entry["twin"]]
    assert twin["checked"].startswith("in float32 with 1 block")
    found = [node.op_type for node in ir.load(out / "level-2.cuda.onnx").graph]
    assert found.count("MultiHeadAttention") == BLOCKS
    assert np.isfinite(twin["error"])
