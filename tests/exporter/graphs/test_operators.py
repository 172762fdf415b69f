"""The operators of the domain ``ddit``: what their functions compute, against the equations in NumPy."""

from math import inf, pi, sqrt

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from ddit.exporter.graphs.operators import CONTRIB, CONTRIB_VERSION, DOMAIN, FUNCTIONS, add_functions

B, L, S, HEADS, SIZE = 2, 3, 5, 2, 8
C = HEADS * SIZE
M = 24
EPSILON = 1e-3
INNER = {"Limited", "Rotary"}  # parts of other functions, which no twin names
ELSEWHERE = {"Float8MatMul"}  # compared with torch in tests/runtime/backends/test_float8.py

random = np.random.default_rng(0)


def numbers(*shape: int) -> np.ndarray:
    return random.standard_normal(shape)


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)


def rms_norm(x, weight, across):
    heads = x if across else x.reshape(*x.shape[:2], HEADS, SIZE)
    return (heads / np.sqrt((heads**2).mean(-1, keepdims=True) + EPSILON) * weight).reshape(x.shape)


def rotary(x, cos, sin):
    """RoFormer, neighbours as pairs, the same angles in every head."""
    a, b = np.moveaxis(x.reshape(*x.shape[:2], HEADS, SIZE // 2, 2), -1, 0)
    cos, sin = cos[:, None], sin[:, None]
    return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)


def gelu(x):
    """Its tanh form."""
    return x / 2 * (1 + np.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))


def modulated_norm(x, scale, shift, offset=1.0):
    return layer_norm(x) * (offset + scale) + shift


def residual(x, y, bias, limit=inf):
    return np.clip(x + y + bias, -limit, limit)


def gated_residual(x, y, bias, gate, limit=inf):
    return np.clip(x + gate * (y + bias), -limit, limit)


def with_norm(total, scale, shift, offset=1.0):
    return total, modulated_norm(total, scale, shift, offset)


def joined(text, text_bias, text_weight, x, bias, weight, cos, sin, across=0):
    both = [rms_norm(text + text_bias, text_weight, across), rms_norm(x + bias, weight, across)]
    return rotary(np.concatenate(both, 1), cos, sin)


EQUATIONS = {
    "ModulatedNorm": modulated_norm,
    "Residual": residual,
    "ResidualNorm": lambda x, y, bias, scale, shift, limit=inf, **offset: with_norm(
        residual(x, y, bias, limit), scale, shift, **offset
    ),
    "GatedResidual": gated_residual,
    "GatedResidualNorm": lambda x, y, bias, gate, scale, shift, limit=inf, **offset: with_norm(
        gated_residual(x, y, bias, gate, limit), scale, shift, **offset
    ),
    "GatedResidualWithBranch": lambda x, y, bias, branch, gate, limit=inf: gated_residual(
        x, y + branch, bias, gate, limit
    ),
    "GatedResidualNormWithBranch": lambda x, y, bias, branch, gate, scale, shift, limit=inf, **offset: with_norm(
        gated_residual(x, y + branch, bias, gate, limit), scale, shift, **offset
    ),
    "BiasNorm": lambda x, bias, weight, across=0: rms_norm(x + bias, weight, across),
    "BiasNormRotary": lambda x, bias, weight, cos, sin, across=0: rotary(rms_norm(x + bias, weight, across), cos, sin),
    "JoinedBiasNormRotary": joined,
    "JoinedBias": lambda text, text_bias, x, bias: np.concatenate([text + text_bias, x + bias], 1),
    "BiasGelu": lambda h, bias: gelu(h + bias),
    "BiasGeluWithBranch": lambda h, bias, branch: gelu(h + bias + branch),
    "JoinedBiasGelu": lambda first, h, bias: np.concatenate([first, gelu(h + bias)], -1),
    "JoinedBiasGeluWithBranch": lambda first, h, bias, branch: np.concatenate([first, gelu(h + bias + branch)], -1),
}
WHOLE_ROWS = {"offset": 0.0}  # a norm with weights of its own, one row for all samples
VARIANTS = [(name, {}) for name in EQUATIONS]
VARIANTS += [(name, {"limit": 0.75}) for name in EQUATIONS if "Residual" in name]
VARIANTS += [(name, WHOLE_ROWS) for name in EQUATIONS if name.startswith("ModulatedNorm") or "ResidualNorm" in name]
VARIANTS += [(name, {"across": 1}) for name in EQUATIONS if name.startswith(("BiasNorm", "JoinedBiasNorm"))]


def inputs_of(name: str, options: dict) -> dict[str, np.ndarray]:
    """Random inputs by their names."""
    gelus, joined = "Gelu" in name, name.startswith("Joined")
    width = M if gelus else C
    weight = C if options.get("across") else SIZE
    rows = (C,) if "offset" in options else (B, 1, C)
    shapes = {
        "first": (B, S, C),
        "text": (B, L, C),
        "branch": (B, S, width),
        "bias": (width,),
        "text_bias": (C,),
        "weight": (weight,),
        "text_weight": (weight,),
        "gate": (B, 1, C),
        "scale": rows,
        "shift": rows,
        "cos": (L + S if joined else S, SIZE // 2),
        "sin": (L + S if joined else S, SIZE // 2),
    }
    names = FUNCTIONS[name].to_function_proto().input
    return {one: numbers(*shapes.get(one, (B, S, width))) for one in names}


def run(name: str, inputs: dict[str, np.ndarray], options: dict) -> list[np.ndarray]:
    """One node of the operator in a model that carries its function."""
    values = {
        one: ir.Value(name=one, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape))
        for one, array in inputs.items()
    }
    outputs = len(FUNCTIONS[name].to_function_proto().output)
    node = ir.node(name, list(values.values()), attributes=options, domain=DOMAIN, num_outputs=outputs)
    for index, output in enumerate(node.outputs):
        output.name, output.type = f"output_{index}", next(iter(values.values())).type
    opsets = {"": 23, CONTRIB: CONTRIB_VERSION}
    graph = ir.Graph(list(values.values()), node.outputs, nodes=[node], opset_imports=opsets, name=name)
    model = ir.Model(graph, ir_version=10)
    add_functions(model)
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 3
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, session_options, providers=["CPUExecutionProvider"]).run(None, inputs)


@pytest.mark.parametrize(
    ("wide", "narrow", "tolerance"),
    [("float32", "float32", 1e-5), ("float16", "float16", 1e-2), ("float32", "float16", 4e-3)],
)
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_a_function_computes_its_equation(name, options, wide, narrow, tolerance):
    """In float32, in half precision, and in half precision with float32 modulation (Wan)."""
    exact = inputs_of(name, options)
    types = dict.fromkeys(("gate", "scale", "shift"), wide) | dict.fromkeys(("cos", "sin"), "float32")
    inputs = {one: array.astype(types.get(one, narrow)) for one, array in exact.items()}
    equation = EQUATIONS[name](*(array.astype(np.float64) for array in inputs.values()), **options)
    expected = equation if isinstance(equation, tuple) else (equation,)
    attributes = dict(options)
    attributes |= {"epsilon": EPSILON} if "Norm" in name else {}
    attributes |= {"num_heads": HEADS} if "BiasNorm" in name else {}
    found = run(name, inputs, attributes)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, np.dtype(narrow))
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())
    if options.get("limit"):
        assert np.abs(found[0]).max() == options["limit"]


def test_every_function_is_checked():
    assert EQUATIONS.keys() | INNER | ELSEWHERE == FUNCTIONS.keys()
