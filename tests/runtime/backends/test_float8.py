"""Products in FP8: kernel, cuBLASLt's part and the operator's function against torch._scaled_mm, scaled row by row."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

import emulated
from ddit.exporter.graphs.float8 import quantise
from ddit.exporter.graphs.operators import FUNCTIONS
from ddit.runtime.backends.onnxruntime import kernels

TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "fp16": 1e-3, "bf16": 8e-3}  # half the distance of two numbers of the type, or so
SIZES = {  # B, S, K, N
    "small": (2, 3, 64, 48),
    "smallest": (1, 1, 16, 16),
    "one vector a thread": (1, 5, 1024, 32),
    "two vectors a thread": (1, 2, 2080, 16),
    "no tokens": (1, 0, 32, 16),
}
MODES = {  # what cuBLASLt has on a GPU
    "scales": {},
    "scales, exact sums": {"DDIT_EMULATED_FAST": "0"},
    "no scales": {"DDIT_EMULATED_SCALES": "0"},
}


def tensors(size):
    """x (B, S, K) with rows that are large, tiny and zero, and a weight (K, N), seeded."""
    batch, tokens, inner, outer = SIZES[size]
    rng = np.random.default_rng(7)
    x = rng.standard_normal((batch, tokens, inner)).astype(np.float32)
    weight = rng.standard_normal((inner, outer)).astype(np.float32) * np.exp(rng.standard_normal(outer) * 2)
    flat = x.reshape(-1, inner)
    for row, factor in zip(range(1, len(flat)), (30.0, 1e-3, 0.0), strict=False):
        flat[row] *= factor
    return x, weight.astype(np.float32)


def expected(size, dtype):
    """Rows and channels with a scale each, by torch."""
    x, weight = tensors(size)
    x = torch.from_numpy(x).to(TORCH[dtype]).float()
    rows, weight = x.reshape(-1, x.shape[-1]), torch.from_numpy(weight).T
    row_scale, channel_scale = (
        torch.where((largest := one.abs().amax(1, keepdim=True)) > 0, largest / 448, 1.0) for one in (rows, weight)
    )
    q, w = (rows / row_scale).to(torch.float8_e4m3fn), (weight / channel_scale).to(torch.float8_e4m3fn)
    result = torch._scaled_mm(q, w.T, scale_a=row_scale, scale_b=channel_scale.T, out_dtype=torch.float32)
    return result.reshape(*x.shape[:2], weight.shape[0]).numpy()


def model(size, dtype):
    """The operator between casts from and to float32, with the function that says what it is."""
    rounded, scale = quantise(tensors(size)[1])
    weight = helper.make_tensor("weight", TensorProto.UINT8, rounded.shape, rounded.tobytes(), raw=True)
    scale = helper.make_tensor("scale", TensorProto.FLOAT, scale.shape, scale.tobytes(), raw=True)
    nodes = [
        helper.make_node("Cast", ["x"], ["x.cast"], to=TYPES[dtype]),
        helper.make_node("Float8MatMul", ["x.cast", "weight", "scale"], ["y"], domain="ddit"),
        helper.make_node("Cast", ["y"], ["result"], to=TensorProto.FLOAT),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "S", rounded.shape[1]])
    wanted = helper.make_tensor_value_info("result", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "product", [given], [wanted], [weight, scale])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("ddit", 1)]
    functions = [FUNCTIONS["Float8MatMul"].to_function_proto()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11, functions=functions).SerializeToString()


def given(dtype, sizes=SIZES):
    """Every size's model and input."""
    models = {f"{size}/model": np.frombuffer(model(size, dtype), np.uint8) for size in sizes}
    return models | {f"{size}/x": tensors(size)[0] for size in sizes}


def check(found, dtype, sizes=SIZES):
    for size in sizes:
        wanted, actual = expected(size, dtype), found[f"{size}/result"]
        assert actual.shape == wanted.shape
        error = np.linalg.norm(actual - wanted, axis=-1)
        assert np.all(error <= TOLERANCE[dtype] * np.linalg.norm(wanted, axis=-1) + 1e-6), size


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    return emulated.build(tmp_path_factory.mktemp("float8"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TYPES)
def test_a_product_is_that_of_torch(emulation, dtype, mode):
    check(emulated.run(emulation, f"{dtype}-{mode}", given(dtype), **MODES[mode]), dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_without_cublaslt_the_function_computes_the_same(tmp_path, dtype):
    sizes = [size for size in SIZES if size != "no tokens"]  # of which ONNX Runtime 1.31 cannot multiply the scales
    check(emulated.run(emulated.build(tmp_path, cublaslt=False), dtype, given(dtype, sizes)), dtype, sizes)


def test_weights_keep_what_fp8_holds():
    weight = np.array([[448.0, -1.0, 0.0], [2.0, 3.0, 0.0]], np.float32)
    rounded, scale = quantise(weight)
    assert rounded.shape == (3, 2)
    np.testing.assert_array_equal(scale, [1, np.float32(3 / 448), 1])
    np.testing.assert_array_equal(rounded.astype(np.float32), [[448, 2], [-144, 448], [0, 0]])


def test_a_gpu_without_fp8_has_no_such_products():
    assert "8.6" in kernels.why_no_float8("8.6")
    assert "8.0" in kernels.why_no_float8("8.0")
