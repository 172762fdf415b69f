"""Opset 17 for TensorRT 8.6: the lowering rule by rule, then whole graphs."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto
from PIL import Image

from conftest import make_once, run
from ddit.exporter.adapter import load_adapter
from ddit.exporter.families.base import Family
from ddit.exporter.families.flux.model import Flux
from ddit.exporter.families.wan.model import Wan
from ddit.exporter.graphs.opset17 import lower_to_opset17
from ddit.exporter.graphs.trace import export_graph
from ddit.exporter.graphs.weights import WeightFiles
from ddit.exporter.models import find_model
from ddit.runtime import Bundle
from ddit.runtime.cli import main as ddit_run
from ddit.runtime.errors import ModelError

GRAPHS = ("clip", "t5", "level-2", "level-4", "step", "vae_decoder")
WAN_GRAPHS = ("umt5", "level-2", "level-4", "step", "guide", "gate", "vae_first_frame", "vae_next_frames")

# Operators and the types of their data that TensorRT 8.6's parser reads, as far as exported graphs use them, from the
# table in onnx-tensorrt's docs/operators.md for 8.5 and the changelog's additions for 8.6. It reads INT64 as INT32.
NUMBERS = {"FP32", "FP16", "INT32"}
FLOATS = {"FP32", "FP16"}
ANY = {*NUMBERS, "BOOL"}
TENSORRT_8_6 = {
    **dict.fromkeys(("Abs", "Add", "Div", "Max", "Min", "Mul", "Neg", "Sub"), NUMBERS),
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "IsNaN", "Less", "LessOrEqual", "Pad", "Range"), NUMBERS),
    **dict.fromkeys(("Cos", "Log", "Pow", "Reciprocal", "Sigmoid", "Sin", "Softmax", "Sqrt", "Tanh"), FLOATS),
    **dict.fromkeys(("Clip", "Conv", "Gemm", "InstanceNormalization", "MatMul", "Resize"), FLOATS),
    **dict.fromkeys(("ReduceL2", "ReduceMean", "ReduceSum"), FLOATS),
    "And": {"BOOL"},
    "Not": {"BOOL"},
    **dict.fromkeys(("Cast", "Concat", "Expand", "Gather", "GatherND", "Reshape", "Shape", "Slice"), ANY),
    **dict.fromkeys(("Split", "Squeeze", "Transpose", "Unsqueeze", "Where"), ANY),
    "ConstantOfShape": {"FP32"},
    # since 8.6
    "ArgMax": NUMBERS,
    "IsInf": FLOATS,
    "LayerNormalization": FLOATS,
    # the table has it for floats; the parser takes what its layer takes, and IReduceLayer takes INT32
    "ReduceMax": NUMBERS,
}
TYPES = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT32",
    TensorProto.BOOL: "BOOL",
}
# inputs that it takes as initializers only
CONSTANT_INPUTS = {"InstanceNormalization": (1, 2), "Resize": (2,), "Slice": (3,), "Squeeze": (1,), "Unsqueeze": (1,)}


def small(text: str) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 18, "custom": 1]> small {text}')


def lowered(text: str, **inputs: np.ndarray) -> onnx.GraphProto:
    """A small graph, lowered; it must give what it gave before."""
    model = small(text)
    before = ir.to_proto(model)
    lower_to_opset17(model, "small")
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert after.ir_version == 8
    assert [node.domain for node in after.graph.node] == [""] * len(after.graph.node)
    expected, actual = (ort.InferenceSession(m.SerializeToString()).run(None, inputs) for m in (before, after))
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    return after.graph


def operators(graph: onnx.GraphProto) -> list[str]:
    return [node.op_type for node in graph.node if node.op_type != "Constant"]


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("start = 0", ["Shape"]),
        ("end = 9", ["Shape"]),
        ("start = 1", ["Shape", "Gather"]),
        ("end = -1", ["Shape", "Gather"]),
        ("start = -2, end = -1", ["Shape", "Gather"]),
        ("start = -9, end = 2", ["Shape", "Gather"]),
        ("start = 2, end = 1", ["Shape", "Gather"]),
    ],
)
def test_some_dimensions_are_gathered(attributes, expected):
    graph = lowered(f"(float[N, 3, 5] x) => (int64[M] y) {{ y = Shape<{attributes}>(x) }}", x=np.zeros((2, 3, 5), "f"))
    assert operators(graph) == expected
    assert not [a.name for node in graph.node for a in node.attribute if node.op_type == "Shape"]


@pytest.mark.parametrize(("size", "inputs"), [(6, 1), (7, 2), (8, 2)])
def test_a_split_into_parts_keeps_its_smaller_last_part(size, inputs):
    text = f"(float[N, {size}] x) => (float[N, A] a, float[N, B] b, float[N, C] c)"
    graph = lowered(f"{text} {{ a, b, c = Split<axis = -1, num_outputs = 3>(x) }}", x=np.ones((2, size), "f"))
    assert len(graph.node[-1].input) == inputs


def test_a_split_into_given_sizes_stays():
    text = "(float[N, 6] x, int64[2] sizes) => (float[N, A] a, float[N, B] b) { a, b = Split<axis = 1>(x, sizes) }"
    graph = lowered(text, x=np.ones((2, 6), "f"), sizes=np.array([5, 1]))
    assert operators(graph) == ["Split"]


@pytest.mark.parametrize(
    ("reduction", "shape", "expected"),
    [
        ("a = Constant<value_ints = [-1, 0]>() y = ReduceMean<keepdims = 0>(x, a)", "A", "ReduceMean"),
        ("a = Constant<value_ints = [1]>() y = ReduceMax<noop_with_empty_axes = 1>(x, a)", "2, 1, 4", "ReduceMax"),
        ("a = Constant<value_ints = [1]>() y = ReduceL2(x, a)", "2, 1, 4", "ReduceL2"),
        ("y = ReduceMin(x)", "1, 1, 1", "ReduceMin"),
        ("y = ReduceProd<noop_with_empty_axes = 1>(x)", "2, N, 4", "Identity"),
        ("a = Constant<value = int64[0] {}>() y = ReduceMean(x, a)", "1, 1, 1", "ReduceMean"),
        ("a = Constant<value = int64[0] {}>() y = ReduceMin<noop_with_empty_axes = 1>(x, a)", "2, N, 4", "Identity"),
    ],
)
def test_axes_become_an_attribute(reduction, shape, expected):
    text = f"(float[2, N, 4] x) => (float[{shape}] y) {{ {reduction} }}"
    graph = lowered(text, x=np.random.rand(2, 3, 4).astype("f"))
    assert operators(graph) == [expected]
    assert len(graph.node[-1].input) == 1


@pytest.mark.parametrize("rest", ["", ", value", ", value, "])
def test_a_pad_loses_the_axes_that_it_does_not_name(rest):
    pad = f"value = Constant<value_float = 2.0>() y = Pad(x, pads{rest})"
    text = f"(float[2, N] x) => (float[M, K] y) {{ pads = Constant<value_ints = [0, 1, 0, 2]>() {pad} }}"
    graph = lowered(text, x=np.random.rand(2, 3).astype("f"))
    assert len(graph.node[-1].input) <= 3


def test_a_resize_loses_what_says_nothing():
    resize = 'Resize<mode = "nearest", antialias = 0, keep_aspect_ratio_policy = "stretch">'
    text = f"{{ scales = Constant<value_floats = [1.0, 2.0]>() y = {resize}(x, , scales) }}"
    graph = lowered(f"(float[2, N] x) => (float[2, M] y) {text}", x=np.random.rand(2, 3).astype("f"))
    assert [attribute.name for attribute in graph.node[-1].attribute] == ["mode"]


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ("y = Mish(x)", "Mish: opset 17 has no such operator or an older one"),
        ("y = Pad(x, n, , n)", "Pad: it names its axes"),
        ("y = custom.Thing(x)", "Thing: opset 17 has no such operator or an older one"),
        ("y = ReduceMax(x, n)", "ReduceMax: its axes are not constant"),
        ("y, z = Split<num_outputs = 2>(x)", "Split: the size that it splits is not known"),
        ("y, z, u, v = Split<axis = 1, num_outputs = 4>(x)", "Split: 5 cannot be split into 4"),
        ("y = Resize<antialias = 1>(x, , , n)", "Resize: antialias = 1"),
        ("y = Resize<axes = [1]>(x, , , n)", "Resize: axes = "),
        ("a = Relu(x) y = Shape<start = 1>(a)", "Shape: the rank of its input is not known"),
    ],
)
def test_what_cannot_be_lowered_is_named(nodes, words):
    model = small(f"(float[N, 5] x, int64[1] n) => (float[N, M] y) {{ {nodes} }}")
    with pytest.raises(ModelError) as error:
        lower_to_opset17(model, "small")
    assert str(error.value).startswith(f"small cannot be lowered to opset 17: {words}")


def export_graphs(family: Family, names: tuple[str, ...], folder: Path) -> None:
    """Some of a family's graphs at opset 17, unchecked."""
    folder.mkdir()
    weights = WeightFiles(folder)
    graphs = [export_graph(job, 17, weights) for job in family.jobs() if job.name in names]
    weights.write()
    for graph in graphs:
        graph.save(folder, weights)


@pytest.fixture(scope="module")
def half(shared_folder, tiny_pipeline, tiny_adapter) -> Path:
    """The graphs that half precision changes most, in it."""

    def export(folder: Path) -> None:
        model = Flux(find_model(str(tiny_pipeline)), (2, 4), "fp16", load_adapter(tiny_adapter))
        export_graphs(model, ("t5", "level-4"), folder)

    return make_once(shared_folder / "opset17-half", export)


def check_for_tensorrt(path: Path) -> None:
    """See that a file is valid at opset 17 and holds nothing that TensorRT 8.6's parser refuses."""
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert model.ir_version == 8
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert not model.functions
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    assert not any(part.metadata_props for part in (*values, *model.graph.node))  # IR version 8 has no such field
    constants = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = constants | {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    for node in model.graph.node:
        schema = onnx.defs.get_schema(node.op_type, 17, node.domain)
        assert {attribute.name for attribute in node.attribute} <= set(schema.attributes), node
        data = {"ConstantOfShape": node.output, "Where": node.input[1:]}.get(node.op_type, node.input)[0]
        assert TYPES[types[data]] in TENSORRT_8_6.get(node.op_type, ()), node
        for index in CONSTANT_INPUTS.get(node.op_type, ()):
            assert index >= len(node.input) or node.input[index] in constants, node


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_graph_is_one_for_tensorrt(opset17_bundle, graph):
    check_for_tensorrt(opset17_bundle / f"{graph}.onnx")


@pytest.fixture(scope="module")
def clips(shared_folder, tiny_wan) -> Path:
    """Those graphs of Wan's that FLUX.1 has nothing like, in half precision."""

    def export(folder: Path) -> None:
        export_graphs(Wan(find_model(str(tiny_wan)), (2, 4), "fp16"), WAN_GRAPHS, folder)

    return make_once(shared_folder / "opset17-clips", export)


@pytest.mark.parametrize("graph", ["t5", "level-4"])
def test_half_precision_graphs_are_for_tensorrt(half, graph):
    check_for_tensorrt(half / f"{graph}.onnx")


@pytest.mark.parametrize("graph", WAN_GRAPHS)
def test_a_clip_s_graphs_are_for_tensorrt(clips, graph):
    check_for_tensorrt(clips / f"{graph}.onnx")


def test_the_bundle_makes_the_same_picture(opset17_bundle, tiny_bundle, tmp_path):
    assert Bundle.open(opset17_bundle).manifest.opset == 17
    options = ("--schedule", "fixed:4x2,2x2", "--height", 64, "--width", 128, "--seed", 3)
    pictures = []
    for folder in (opset17_bundle, tiny_bundle):
        out = tmp_path / f"{folder.name}.png"
        result = run(ddit_run, "generate", folder, "a red circle", *options, "--out", out)
        assert result.exit_code == 0, result.stderr
        pictures.append(np.asarray(Image.open(out)).astype(int))
    assert np.ptp(pictures[0]) > 0
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
