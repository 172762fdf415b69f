"""LoRA merged into the weights that an engine owns."""

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from ddit.runtime import Bundle
from ddit.runtime.backends.tensorrt.merge import merge_lora

BRANCHES = 4 * 1 + 2 * 2  # feed-forward layers of the tiny pipeline's double and single blocks
FILE = "merged.weights"


@pytest.fixture(params=["tiny_bundle", "opset17_bundle"])
def bundle(request, tmp_path) -> Bundle:
    """A copy to write into, at the newest and at the oldest opset."""
    return Bundle.open(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "a.bundle"))


def weights(model: ir.Model) -> list[str]:
    return [name for name in model.graph.initializers if name]


def run(path: Path, bundle: Bundle, graph: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    sizes = {"B": 1, "H": 32, "W": 16, "L": 16}
    inputs = {
        spec.name: rng.standard_normal(spec.resolve(sizes)).astype(np.float32) for spec in bundle.graph(graph).inputs
    }
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (velocity,) = session.run(None, inputs)
    return velocity


def test_a_merged_graph_computes_the_same_without_branches(bundle):
    model = ir.load(bundle.path / "level-4.onnx")
    nodes = len(model.graph)
    assert merge_lora(model, bundle.path, FILE) == BRANCHES
    assert len(model.graph) == nodes - 4 * BRANCHES  # two products, the scale and the sum
    assert not [name for name in weights(model) if ".lora_" in name]
    assert len([name for name in weights(model) if name.startswith("merged.")]) == BRANCHES
    assert all(value.uses() for value in model.graph.initializers.values())

    merged = bundle.path / "merged.onnx"
    ir.save(model, merged)
    expected = run(bundle.path / "level-4.onnx", bundle, "level-4")
    error = np.linalg.norm(run(merged, bundle, "level-4") - expected) / np.linalg.norm(expected)
    assert error < 1e-5


def test_the_native_level_has_nothing_to_merge(bundle):
    model = ir.load(bundle.path / "level-2.onnx")
    before = weights(model)
    assert merge_lora(model, bundle.path, FILE) == 0
    assert weights(model) == before
    assert not (bundle.path / FILE).exists()


def test_a_branch_of_another_form_stays(bundle):
    model = ir.load(bundle.path / "level-4.onnx")
    up = next(node for node in model.graph if len(node.inputs) == 2 and "lora_B" in (node.inputs[1].name or ""))
    scaling = up.outputs[0].consumers()[0]
    scaling.op_type = "Div"
    assert merge_lora(model, bundle.path, FILE) == BRANCHES - 1
    assert up in list(model.graph)
