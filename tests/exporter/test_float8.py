"""ddit-export fp8: which products are in FP8, what their weights become, and that a bundle is never half of it."""

import json
import shutil
from collections import Counter

import onnx
import pytest
import torch
from safetensors.torch import load_file

from conftest import run
from ddit.exporter import float8 as command
from ddit.exporter.cli import main
from ddit.exporter.graphs import float8
from ddit.runtime import Bundle, Pipeline
from ddit.runtime.backends.onnxruntime.host import FLOAT8
from ddit.runtime.cli import main as ddit_run
from ddit.runtime.policies import Fixed
from ddit.runtime.tools.verify import relative_error

SIZE = {"height": 128, "width": 64}


@pytest.fixture
def small(monkeypatch):
    """The tiny model's products are large enough."""
    monkeypatch.setattr(float8, "FEWEST", 16)


@pytest.fixture
def copied(tiny_bundle, tmp_path, small):
    return shutil.copytree(tiny_bundle, tmp_path / "copied.bundle")


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def products(path, file):
    """How many nodes of a graph there are of each kind of product, and the weights of those that stayed."""
    model = onnx.load(path / file, load_external_data=False)
    kinds = Counter(node.op_type for node in model.graph.node)
    return kinds, {node.input[1] for node in model.graph.node if node.op_type == "MatMul"}


def test_the_trunk_s_products_are_in_fp8(copied):
    before = Bundle.open(copied)
    result = run(main, "fp8", copied)
    assert result.exit_code == 0, result.stderr
    before.check_current()  # whoever has the bundle open goes on
    manifest = Bundle.open(copied).manifest
    for patch in manifest.patches:
        info = manifest.graphs[f"level-{patch}"]
        assert info.twins[FLOAT8] == f"level-{patch}.cuda-fp8.onnx"
        assert info.on(FLOAT8).weights == (*info.weights, "cuda-fp8.safetensors")
        assert info.on("cuda").weights == info.weights
        (kinds, left), (old, _) = products(copied, info.twins[FLOAT8]), products(copied, info.twins["cuda"])
        assert kinds["Float8MatMul"] + kinds["MatMul"] == old["MatMul"]
        assert kinds["Gemm"] == old["Gemm"]
        # 2 double and single blocks' products; embedding, head and LoRA's branches stay
        assert kinds["Float8MatMul"] >= 10
        assert not [name for name in left if "blocks." in name and "lora" not in name]
    errors = [result for result in manifest.parity if result.twin == FLOAT8]
    assert {result.graph for result in errors} == {level.graph for level in manifest.levels}
    assert all(1e-4 < result.error < 0.1 for result in errors)
    again = run(main, "fp8", copied)
    assert again.exit_code == 0
    assert "has its FP8 twins already" in again.stderr


def test_weights_are_rounded_as_torch_does_it(copied):
    assert run(main, "fp8", copied).exit_code == 0
    rounded, trunk = (load_file(copied / f"{name}.safetensors") for name in ("cuda-fp8", "transformer"))
    names = [name.removesuffix(".fp8") for name in rounded if name.endswith(".fp8")]
    assert len(rounded) == 2 * len(names)
    for name in names:
        weight = trunk[name].T.float()
        scale = weight.abs().amax(1, keepdim=True) / 448
        assert torch.equal(rounded[f"{name}.fp8_scale"], scale[:, 0])
        expected = (weight / scale).to(torch.float8_e4m3fn)
        assert torch.equal(rounded[f"{name}.fp8"].view(torch.uint8), expected.view(torch.uint8))


def test_pictures_in_fp8_are_nearly_the_same(copied):
    assert run(main, "fp8", copied).exit_code == 0
    levels = {"schedule": Fixed((2, 4, 8)), "seed": 3, **SIZE}
    exact, coarse = (Pipeline.open(copied, backend=name)("a red circle", **levels) for name in ("cpu", "cpu-fp8"))
    assert 1e-5 < relative_error(coarse.latent, exact.latent) < 0.1
    checked = run(ddit_run, "verify", copied, "--backend", "cpu-fp8")
    assert checked.exit_code == 0, checked.stderr
    assert "cuda-fp8" in run(ddit_run, "inspect", copied).stdout


def test_a_model_that_fp8_spoils_is_refused_and_the_bundle_stays(copied, monkeypatch):
    before = files(copied)
    monkeypatch.setattr(command, "FP8_TOLERANCE", 1e-6)
    result = run(main, "fp8", copied)
    assert result.exit_code == 1
    assert "level-2 in FP8 is off by" in result.stderr.splitlines()[-1]
    assert files(copied) == before


def test_a_bundle_without_twins_is_refused(copied):
    manifest = json.loads((copied / "bundle.json").read_text())
    for graph in manifest["graphs"].values():
        graph["twins"] = {}
    (copied / "bundle.json").write_text(json.dumps(manifest))
    result = run(main, "fp8", copied)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "level-2 has no twin for the cuda backend" in result.stderr


def test_a_model_without_large_products_is_refused(tiny_bundle):
    result = run(main, "fp8", tiny_bundle)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no products that are large enough for FP8" in result.stderr


@pytest.mark.parametrize("backend", ["cuda-fp8", "cpu-fp8"])
def test_without_the_twins_the_backends_say_what_to_do(tiny_bundle, backend):
    result = run(ddit_run, "generate", tiny_bundle, "red", "--backend", backend)
    assert result.exit_code == 1
    assert f"make them: ddit-export fp8 {tiny_bundle}" in result.stderr


def test_without_references_inputs_are_drawn(copied, monkeypatch):
    monkeypatch.setattr(command, "load_references", lambda bundle: {})
    assert run(main, "fp8", copied).exit_code == 0
    sizes = [one.sizes for one in Bundle.open(copied).manifest.parity if one.twin == FLOAT8]
    assert all(one["B"] == 1 for one in sizes)
