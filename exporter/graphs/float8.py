"""A level's twin with its large matrix products in FP8: `Float8MatMul` in place of ``MatMul``.

A product becomes one where the trunk's weights multiply tokens: these are nearly all of a level's arithmetic.
Modulations multiply one row for every sample, and LoRA's branches are narrow; both stay as they are. So do the weights
that only one level has, with which it cuts a picture into patches and puts it together again.

The weights are rounded with one scale for every output channel, in the same way as torchao does it (PerRow), and are
stored as (N, K), each row of a product's sum side by side, which is what the tensor cores of all GPUs with FP8 take.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from ddit.exporter.graphs.operators import DOMAIN, add_functions
from ddit.exporter.graphs.stored import Stored
from ddit.exporter.graphs.values import integers
from ddit.runtime.bundle.names import FP8, FP8_SCALE

LARGEST = 448.0  # of FLOAT8E4M3FN
MULTIPLE = 16  # of channels: cuBLASLt wants rows of 16 bytes
FEWEST, MOST = 256, 16384  # channels: below, a product takes less time than rounding its input; above, the kernel stops
# operators whose result has as many dimensions as their first input
SAME_RANK = {"Cast", "Clip", "FastGelu", "Gelu", "Identity", "LayerNormalization", "MatMul", "RMSNormalization"}
SAME_RANK |= {"Slice", "Split"}


@dataclass(frozen=True)
class Rounded:
    """A product's weight in FP8 and its scales, as tensors of a file."""

    weight: ir.ExternalTensor  # (N, K) of FLOAT8E4M3FN, in bytes
    scale: ir.ExternalTensor  # (N) of float32


def find_weights(models: Sequence[ir.Model], files: Collection[str]) -> dict[str, ir.ExternalTensor]:
    """The weights (K, N) of the levels' twins that can be in FP8, by name: of all that lie in the given files.

    One that any level uses for something else stays as it is in all of them, so that nothing is stored twice.
    """
    found: dict[str, ir.ExternalTensor] = {}
    refused: set[str] = set()
    for model in models:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor) or tensor.location not in files:
                continue
            if _fits(tensor) and all(_multiplies_tokens(node, place) for node, place in value.uses()):
                found[name] = tensor
            else:
                refused.add(name)
    return {name: tensor for name, tensor in found.items() if name not in refused}


def _fits(tensor: ir.ExternalTensor) -> bool:
    shape = tensor.shape.numpy()
    return len(shape) == 2 and all(FEWEST <= one <= MOST and one % MULTIPLE == 0 for one in shape)


def _multiplies_tokens(node: ir.Node, place: int) -> bool:
    return node.op_type == "MatMul" and place == 1 and node.inputs[0] is not None and is_tokens(node.inputs[0])


def is_tokens(value: ir.Value) -> bool:
    """Whether a tensor is (B, S, C), as far as that can be told; a level's graph holds no shapes in between."""
    if value.shape is not None:
        return value.shape.rank() == 3
    node = value.producer()
    if node is None:
        return False
    if node.op_type == "Reshape" and node.inputs[1] is not None:
        return _length(node.inputs[1]) == 3
    if node.domain == DOMAIN or node.op_type == "MultiHeadAttention":
        return True
    return node.op_type in SAME_RANK and node.inputs[0] is not None and is_tokens(node.inputs[0])


def _length(shape: ir.Value) -> int | None:
    """How many dimensions a shape has that is put together in the graph."""
    node = shape.producer()
    if node is None or node.op_type != "Concat":
        found = integers(shape)
        return None if found is None else len(found)
    return sum(_length(part) or 1 for part in node.inputs if part is not None)


def layout(weights: Mapping[str, ir.ExternalTensor]) -> dict[str, Stored]:
    """The tensors of the file that holds the weights in FP8, in order."""
    tensors = {}
    for name, weight in weights.items():
        inputs, outputs = weight.shape.numpy()
        tensors[name + FP8] = Stored("F8_E4M3", (outputs, inputs), inputs * outputs)
        tensors[name + FP8_SCALE] = Stored("F32", (outputs,), 4 * outputs)
    return tensors


def contents(weights: Iterable[ir.ExternalTensor]) -> Iterator[bytes]:
    """Their bytes; one weight is in memory at a time."""
    for weight in weights:
        # not its own numpy(), which reads no file that has another name too, as a copy by hard links has
        values = np.memmap(weight.path, weight.dtype.numpy(), "r", weight.offset or 0, weight.shape.numpy())
        rounded, scale = quantise(values)
        yield rounded.tobytes()
        yield scale.tobytes()


def quantise(weight: NDArray[np.generic]) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """(K, N) → (N, K) of FP8, and the scale (N) of every row: its largest number over FP8's largest."""
    wide = weight.T.astype(np.float32, order="C")
    scale = (np.abs(wide).max(axis=1) / np.float32(LARGEST)).astype(np.float32)
    scale[scale < np.finfo(np.float32).tiny] = 1
    wide /= scale[:, None]
    np.clip(wide, -LARGEST, LARGEST, out=wide)  # ml_dtypes makes NaN of what is larger by rounding
    return wide.astype(ml_dtypes.float8_e4m3fn), scale


def use_float8(model: ir.Model, rounded: Mapping[str, Rounded]) -> None:
    """Put `Float8MatMul` in the place of the products with the given weights, by name; in place."""
    for name, tensors in rounded.items():
        value = model.graph.initializers.get(name)
        if value is None:
            continue
        weight, scale = (_initializer(model, tensor) for tensor in (tensors.weight, tensors.scale))
        for product in [node for node, _ in value.uses()]:
            inputs = [product.inputs[0], weight, scale]
            node = ir.node("Float8MatMul", inputs, domain=DOMAIN, name=product.name)
            model.graph.insert_before(product, node)
            output = product.outputs[0]
            node.outputs[0].name, node.outputs[0].type = output.name, output.type
            ir.convenience.replace_all_uses_with(output, node.outputs[0])
            model.graph.remove(product, safe=True)
        del model.graph.initializers[name]
    common.NameFixPass()(model)
    add_functions(model)


def _initializer(model: ir.Model, tensor: ir.ExternalTensor) -> ir.Value:
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    value.const_value = tensor
    model.graph.register_initializer(value)
    return value
