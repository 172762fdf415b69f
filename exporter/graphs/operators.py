"""Operators that do in one pass over the tokens what a level does between its matrix products: the domain ``ddit``.

Each is an ONNX function here, whose body is made of ONNX Runtime's own operators. A model that carries it runs
everywhere: ONNX Runtime puts the body in its place, unless a library of kernels is registered that has one for the
operator. A body costs nothing more than the nodes that it stands for: ONNX Runtime folds what only attributes decide
(limits, heads), and drops casts to the type that a tensor has already.

B samples, S tokens (L of text), C channels, N heads of H numbers. T is the graph's type; gate, scale and shift are of
T or of float32 and have one row for every sample, (B, 1, C), scale and shift also one for all, (C).

===========================  =======================================================================  ================
operator                     computes                                                                 shape
===========================  =======================================================================  ================
ModulatedNorm                norm(x) · (offset + scale) + shift                                       (B, S, C)
Residual                     x + y + bias, within ±limit                                              (B, S, C)
GatedResidual                x + gate · (y + bias), within ±limit                                     (B, S, C)
GatedResidualWithBranch      x + gate · (y + bias + branch), within ±limit                            (B, S, C)
ResidualNorm, …              the modulated norm of such a sum, and the sum                            (B, S, C) each
BiasNorm                     RMS norm of x + bias, of every head or across all                        (B, S, N · H)
BiasNormRotary               the rotary embedding of that, by tables (S, H/2) in float32              (B, S, N · H)
JoinedBiasNormRotary         the same of two after each other, each with its own bias and weight      (B, L + S, N · H)
JoinedBias                   text + its bias, then x + its bias                                       (B, L + S, C)
BiasGelu                     gelu(h + bias), in the tanh form                                         (B, S, M)
BiasGeluWithBranch           gelu(h + bias + branch)                                                  (B, S, M)
JoinedBiasGelu, …            first, then such a gelu, along channels                                  (B, S, C + M)
Float8MatMul                 x · weightᵀ, both in FP8 with a scale for every row                      (B, S, N)
===========================  =======================================================================  ================
"""

from collections.abc import Callable
from math import inf
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.values import OnnxFunction, Opset

DOMAIN, VERSION = "ddit", 1
CONTRIB, CONTRIB_VERSION = "com.microsoft", 1  # ONNX Runtime's own operators
CHANNELS = 8  # the kernels want a multiple of so many channels,
HEADS = (8, 16, 32, 64, 128, 256)  # and one of these sizes of a head, where they work head by head

FLOAT8_NUMBERS = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32).tolist()  # by byte

ddit = Opset(DOMAIN, VERSION)
contrib = Opset(CONTRIB, CONTRIB_VERSION)
FUNCTIONS: dict[str, OnnxFunction] = {}


def operator(function: Callable[..., Any]) -> OnnxFunction:
    """Turn a Python function into an ONNX function of this domain; onnxscript reads its source."""
    translated = script(ddit, default_opset=op)(function)
    FUNCTIONS[translated.name] = translated
    return translated


@operator
def ModulatedNorm(x, scale, shift, epsilon: float = 1e-6, offset: float = 1.0):
    factor = op.Add(scale, op.CastLike(op.Constant(value_float=offset), scale))
    normed = op.LayerNormalization(op.CastLike(x, scale), factor, shift, axis=-1, epsilon=epsilon)
    return op.CastLike(normed, x)


@operator
def Limited(x, limit: float = inf):
    bound = op.Constant(value_float=limit)
    if op.IsInf(bound):
        limited = op.Identity(x)
    else:
        limited = op.Clip(x, op.CastLike(op.Neg(bound), x), op.CastLike(bound, x))
    return limited


@operator
def Residual(x, y, bias, limit: float = inf):
    return ddit.Limited(op.Add(x, op.Add(y, bias)), limit=limit)


@operator
def ResidualNorm(x, y, bias, scale, shift, limit: float = inf, epsilon: float = 1e-6, offset: float = 1.0):
    total = ddit.Residual(x, y, bias, limit=limit)
    normed = ddit.ModulatedNorm(total, scale, shift, epsilon=epsilon, offset=offset)
    return total, normed


@operator
def GatedResidual(x, y, bias, gate, limit: float = inf):
    moved = op.Mul(gate, op.CastLike(op.Add(y, bias), gate))
    return ddit.Limited(op.CastLike(op.Add(op.CastLike(x, gate), moved), x), limit=limit)


@operator
def GatedResidualNorm(x, y, bias, gate, scale, shift, limit: float = inf, epsilon: float = 1e-6, offset: float = 1.0):
    total = ddit.GatedResidual(x, y, bias, gate, limit=limit)
    normed = ddit.ModulatedNorm(total, scale, shift, epsilon=epsilon, offset=offset)
    return total, normed


@operator
def GatedResidualWithBranch(x, y, bias, branch, gate, limit: float = inf):
    return ddit.GatedResidual(x, op.Add(y, branch), bias, gate, limit=limit)


@operator
def GatedResidualNormWithBranch(
    x, y, bias, branch, gate, scale, shift, limit: float = inf, epsilon: float = 1e-6, offset: float = 1.0
):
    total = ddit.GatedResidualWithBranch(x, y, bias, branch, gate, limit=limit)
    normed = ddit.ModulatedNorm(total, scale, shift, epsilon=epsilon, offset=offset)
    return total, normed


@operator
def BiasNorm(x, bias, weight, num_heads: int, epsilon: float = 1e-6, across: int = 0):
    # a norm across all heads is one of a single head
    heads = op.Constant(value_int=num_heads)
    all_at_once = op.Cast(op.Constant(value_int=across), to=ir.DataType.BOOL.value)
    heads = op.Reshape(op.Where(all_at_once, op.Constant(value_int=1), heads), op.Constant(value_ints=[1]))
    shape = op.Concat(op.Constant(value_ints=[0, 0]), heads, op.Constant(value_ints=[-1]), axis=0)
    normed = op.RMSNormalization(op.Reshape(op.Add(x, bias), shape), weight, axis=-1, epsilon=epsilon)
    return op.Reshape(normed, op.Constant(value_ints=[0, 0, -1]))


@operator
def Rotary(x, cos, sin):
    from_the_first = op.Constant(value_ints=[0])
    return contrib.RotaryEmbedding(x, from_the_first, op.CastLike(cos, x), op.CastLike(sin, x), interleaved=1)


@operator
def BiasNormRotary(x, bias, weight, cos, sin, num_heads: int, epsilon: float = 1e-6, across: int = 0):
    normed = ddit.BiasNorm(x, bias, weight, num_heads=num_heads, epsilon=epsilon, across=across)
    return ddit.Rotary(normed, cos, sin)


@operator
def JoinedBiasNormRotary(
    text, text_bias, text_weight, x, bias, weight, cos, sin, num_heads: int, epsilon: float = 1e-6, across: int = 0
):
    text = ddit.BiasNorm(text, text_bias, text_weight, num_heads=num_heads, epsilon=epsilon, across=across)
    x = ddit.BiasNorm(x, bias, weight, num_heads=num_heads, epsilon=epsilon, across=across)
    return ddit.Rotary(op.Concat(text, x, axis=1), cos, sin)


@operator
def JoinedBias(text, text_bias, x, bias):
    return op.Concat(op.Add(text, text_bias), op.Add(x, bias), axis=1)


@operator
def BiasGelu(h, bias):
    return contrib.FastGelu(h, bias)


@operator
def BiasGeluWithBranch(h, bias, branch):
    return contrib.FastGelu(op.Add(h, branch), bias)


@operator
def JoinedBiasGelu(first, h, bias):
    return op.Concat(first, ddit.BiasGelu(h, bias), axis=2)


@operator
def JoinedBiasGeluWithBranch(first, h, bias, branch):
    return op.Concat(first, ddit.BiasGeluWithBranch(h, bias, branch), axis=2)


@operator
def Float8MatMul(x, weight, scale):
    """x (B, S, K) of T, weight (N, K) in bytes, scale (N) of float32 → (B, S, N) of T.

    Every row of x gets the scale that takes its largest number to FP8's largest, when it runs: PerRow of torchao's
    Float8DynamicActivationFloat8WeightConfig, and what torch._scaled_mm computes with row-wise scales. The bytes are
    FLOAT8E4M3FN; they go by as UINT8 because ONNX Runtime before 1.32 takes no FP8 tensors that others put on the GPU.
    """
    wide = op.Cast(x, to=ir.DataType.FLOAT.value)
    largest = op.ReduceMax(op.Abs(wide), op.Constant(value_ints=[-1]), keepdims=1)
    row = op.Div(largest, op.Constant(value_float=448.0))
    # a row of zeros, or of numbers so small that float32 has no reciprocal of the scale
    row = op.Where(op.Less(row, op.Constant(value_float=1.1754943508222875e-38)), op.Constant(value_float=1.0), row)
    rounded = op.Cast(op.Div(wide, row), to=ir.DataType.FLOAT8E4M3FN.value)
    numbers = op.Constant(value_floats=FLOAT8_NUMBERS)
    wide_weight = op.Gather(numbers, op.Cast(op.Transpose(weight, perm=[1, 0]), to=ir.DataType.INT32.value))
    product = op.MatMul(op.Cast(rounded, to=ir.DataType.FLOAT.value), wide_weight)
    return op.CastLike(op.Mul(op.Mul(product, row), scale), x)


def add_functions(model: ir.Model) -> None:
    """Give a model the functions of all operators of this domain that it uses, and of those that they use."""
    wanted = [node.op_type for node in model.graph if node.domain == DOMAIN]
    while wanted:
        name = wanted.pop()
        if (DOMAIN, name, "") in model.functions:
            continue
        function = ir.from_proto(FUNCTIONS[name].to_function_proto())
        assert isinstance(function, ir.Function)
        function.opset_imports[""] = model.opset_imports[""]
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = VERSION
        wanted += [node.op_type for node in function if node.domain == DOMAIN]
