"""The CUDA kernels against the operators' equations in NumPy: their real code, a thread for each of the GPU's."""

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import emulated
from ddit.runtime.backends.device.cuda import Gpu, why_no_gpu
from ddit.runtime.backends.onnxruntime import kernels

TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
TOLERANCE = {"fp32": 2e-6, "fp16": 1e-3, "bf16": 8e-3}  # relative; half the distance of two numbers of the type, or so
PAIRS = ["fp32/fp32", "fp16/fp16", "fp16/fp32", "bf16/bf16", "bf16/fp32"]  # of the graph and of the modulation
B, S, L, N, H = 2, 3, 2, 10, 128  # 160 vectors of 8: threads that keep two, one or none of them
C, M = N * H, 2 * N * H
EPSILON, LIMIT = 1e-6, 1.5


# ---- the equations ----


def layer_norm(x):
    """x without its mean, over its standard deviation, by channel."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + EPSILON)


def rms_norm(x):
    """x over the root of its mean square, over the last axis."""
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + EPSILON)


def gelu(x):
    """Its tanh form (Hendrycks and Gimpel, arXiv 1606.08415)."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def by_head(x):
    """(B, S, N·H) → (B, S, N, H)."""
    return x.reshape(*x.shape[:2], N, H)


def rotary(x, cos, sin):
    """Every pair of neighbours of a head turned by its angle (RoFormer, arXiv 2104.09864); x is (B, S, N, H)."""
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)[None, :, None]
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def residual(x, y, bias, branch=0.0, gate=1.0):
    """x + gate · (y + bias + branch), cut at the limit."""
    return np.clip(x + gate * (y + bias + branch), -LIMIT, LIMIT)


def normed_heads(x, bias, weight, across):
    """(B, S, N·H) → (B, S, N, H), normed over each head or over all of them."""
    x = x + bias
    return by_head(rms_norm(x) * weight) if across else rms_norm(by_head(x)) * weight


def joined(text, text_bias, x, bias):
    """Text tokens first."""
    return np.concatenate([text + text_bias, x + bias], 1)


def modulated(x, scale, shift, offset=1.0):
    """DiT's adaLN (arXiv 2212.09748)."""
    return layer_norm(x) * (offset + scale) + shift


def flat(x):
    """(B, S, N, H) → (B, S, N·H)."""
    return x.reshape(*x.shape[:2], -1)


ROWS = {"x": (B, S, C), "y": (B, S, C), "bias": (C,), "branch": (B, S, C)}
MODULATION = dict.fromkeys(("gate", "scale", "shift"), (B, 1, C))
TEXT = {"text": (B, L, C), "text_bias": (C,), "text_weight": (H,)}
TABLES = {"cos": (S, H // 2), "sin": (S, H // 2)}
LONG_TABLES = {"cos": (L + S, H // 2), "sin": (L + S, H // 2)}
GELU = {"first": (B, S, C), "h": (B, S, M), "bias": (M,), "branch": (B, S, M)}
SHAPES = ROWS | MODULATION | {"weight": (H,)}
OF_TYPE_M = {*MODULATION, "weight", "text_weight"}
LIMITED, NORMED = {"limit": LIMIT}, {"epsilon": EPSILON}
HEADS = {"num_heads": N, "epsilon": EPSILON}
ACROSS = HEADS | {"across": 1}


def case(operator, inputs, equation, attributes=None, shapes=None):
    """An operator, its inputs' names in order, what it computes of them, and its attributes."""
    return operator, tuple(inputs.split()), equation, attributes or {}, SHAPES | (shapes or {})


CASES = {
    "ModulatedNorm": case("ModulatedNorm", "x scale shift", modulated, NORMED),
    "ModulatedNorm, one row": case(
        "ModulatedNorm",
        "x scale shift",
        lambda x, scale, shift: modulated(x, scale, shift, 0.0),
        NORMED | {"offset": 0.0},
        {"scale": (C,), "shift": (C,)},
    ),
    "Residual": case("Residual", "x y bias", residual, LIMITED),
    "ResidualNorm": case(
        "ResidualNorm",
        "x y bias scale shift",
        lambda x, y, bias, scale, shift: (residual(x, y, bias), modulated(residual(x, y, bias), scale, shift)),
        LIMITED | NORMED,
    ),
    "GatedResidual": case(
        "GatedResidual", "x y bias gate", lambda x, y, bias, gate: residual(x, y, bias, gate=gate), LIMITED
    ),
    "GatedResidual, no limit": case("GatedResidual", "x y bias gate", lambda x, y, bias, gate: x + gate * (y + bias)),
    "GatedResidualNorm": case(
        "GatedResidualNorm",
        "x y bias gate scale shift",
        lambda x, y, bias, gate, scale, shift: (
            residual(x, y, bias, gate=gate),
            modulated(residual(x, y, bias, gate=gate), scale, shift),
        ),
        LIMITED | NORMED,
    ),
    "GatedResidualWithBranch": case("GatedResidualWithBranch", "x y bias branch gate", residual, LIMITED),
    "GatedResidualNormWithBranch": case(
        "GatedResidualNormWithBranch",
        "x y bias branch gate scale shift",
        lambda x, y, bias, branch, gate, scale, shift: (
            residual(x, y, bias, branch, gate),
            modulated(residual(x, y, bias, branch, gate), scale, shift),
        ),
        LIMITED | NORMED,
    ),
    "BiasNorm": case(
        "BiasNorm", "x bias weight", lambda x, bias, weight: flat(normed_heads(x, bias, weight, False)), HEADS
    ),
    "BiasNorm, across": case(
        "BiasNorm",
        "x bias weight",
        lambda x, bias, weight: flat(normed_heads(x, bias, weight, True)),
        ACROSS,
        {"weight": (C,)},
    ),
    "BiasNormRotary": case(
        "BiasNormRotary",
        "x bias weight cos sin",
        lambda x, bias, weight, cos, sin: flat(rotary(normed_heads(x, bias, weight, False), cos, sin)),
        HEADS,
        TABLES,
    ),
    "BiasNormRotary, across": case(
        "BiasNormRotary",
        "x bias weight cos sin",
        lambda x, bias, weight, cos, sin: flat(rotary(normed_heads(x, bias, weight, True), cos, sin)),
        ACROSS,
        TABLES | {"weight": (C,)},
    ),
    "JoinedBiasNormRotary": case(
        "JoinedBiasNormRotary",
        "text text_bias text_weight x bias weight cos sin",
        lambda text, text_bias, text_weight, x, bias, weight, cos, sin: flat(
            rotary(
                np.concatenate(
                    [normed_heads(text, text_bias, text_weight, False), normed_heads(x, bias, weight, False)], 1
                ),
                cos,
                sin,
            )
        ),
        HEADS,
        TEXT | LONG_TABLES,
    ),
    "JoinedBias": case("JoinedBias", "text text_bias x bias", joined, shapes=TEXT),
    "BiasGelu": case("BiasGelu", "h bias", lambda h, bias: gelu(h + bias), shapes=GELU),
    "BiasGeluWithBranch": case(
        "BiasGeluWithBranch", "h bias branch", lambda h, bias, branch: gelu(h + bias + branch), shapes=GELU
    ),
    "JoinedBiasGelu": case(
        "JoinedBiasGelu",
        "first h bias",
        lambda first, h, bias: np.concatenate([first, gelu(h + bias)], -1),
        shapes=GELU,
    ),
    "JoinedBiasGeluWithBranch": case(
        "JoinedBiasGeluWithBranch",
        "first h bias branch",
        lambda first, h, bias, branch: np.concatenate([first, gelu(h + bias + branch)], -1),
        shapes=GELU,
    ),
}


def inputs_of(name, seed=0):
    """Seeded inputs of a case, float32."""
    _, names, _, _, shapes = CASES[name]
    rng = np.random.default_rng(seed)
    return {one: rng.standard_normal(shapes[one]).astype(np.float32) for one in names}


def model(name, graph_type, modulation_type):
    """The operator alone, between casts from and to float32."""
    operator, names, _, attributes, shapes = CASES[name]
    outputs = ["sum", "normed"] if "ResidualNorm" in operator else ["result"]
    nodes, given = [], []
    for one in names:
        kind = TYPES[modulation_type if one in OF_TYPE_M else graph_type]
        kind = TensorProto.FLOAT if one in ("cos", "sin") else kind
        nodes.append(helper.make_node("Cast", [one], [f"{one}.cast"], to=kind))
        given.append(helper.make_tensor_value_info(one, TensorProto.FLOAT, shapes[one]))
    nodes.append(helper.make_node(operator, [f"{one}.cast" for one in names], outputs, domain="ddit", **attributes))
    nodes += [helper.make_node("Cast", [one], [f"{one}.float"], to=TensorProto.FLOAT) for one in outputs]
    wanted = [helper.make_tensor_value_info(f"{one}.float", TensorProto.FLOAT, None) for one in outputs]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("ddit", 1)]
    graph = helper.make_graph(nodes, "operator", given, wanted)
    return helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString(), outputs


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    """The operators for ONNX Runtime's CPU provider, and the driver that runs their kernels there."""
    return emulated.build(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module", params=PAIRS)
def results(request, emulation):
    """All cases' outputs for the graph's type and that of the modulation."""
    types = request.param.split("/")
    given = {}
    for name in CASES:
        given[f"{name}/model"] = np.frombuffer(model(name, *types)[0], np.uint8)
        given |= {f"{name}/{one}": value for one, value in inputs_of(name).items()}
    return types[0], emulated.run(emulation, "-".join(types), given)


def check(name, dtype, found):
    """Compare a case's outputs, by ``name/output``, with the equation in float64."""
    expected = CASES[name][2](*(value.astype(np.float64) for value in inputs_of(name).values()))
    outputs = model(name, dtype, dtype)[1]
    for output, value in zip(outputs, expected if len(outputs) > 1 else [expected], strict=True):
        actual = found[f"{name}/{output}.float"]
        assert actual.shape == value.shape
        error = np.linalg.norm(actual - value) / np.linalg.norm(value)
        assert error < TOLERANCE[dtype] * (3 if output == "normed" else 1)


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_computes_its_equation(name, results):
    check(name, *results)


@pytest.mark.gpu
@pytest.mark.skipif(why_no_gpu() is not None, reason=f"no GPU: {why_no_gpu()}")
@pytest.mark.parametrize("types", PAIRS)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_computes_its_equation_on_the_gpu(name, types):
    if kernels.find_library() is None:
        pytest.skip("ddit was installed without its kernels")
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(kernels.load_kernels(Gpu().capability)))
    content, outputs = model(name, *types.split("/"))
    session = ort.InferenceSession(content, options, providers=["CUDAExecutionProvider"])
    values = session.run(None, inputs_of(name))
    check(name, types.split("/")[0], {f"{name}/{one}.float": value for one, value in zip(outputs, values, strict=True)})
