"""What the rules of a level's twin ask about the values of a graph: numbers that are known, heads, biases, rows."""

from typing import Any

import numpy as np
import onnx_ir as ir

from ddit.exporter.graphs.operators import CHANNELS, DOMAIN

FLOAT = ir.DataType.FLOAT
WHOLE_HEADS = [0, 0, -1]  # shape (B, S, heads, size) → (B, S, heads · size)


def constant(op, values: list[int]):
    """A vector of integers, as a node."""
    return op.Constant(value=ir.tensor(values, dtype=ir.DataType.INT64))


def integers(value: ir.Value | None) -> list[int] | None:
    """A constant vector of integers."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or len(tensor.shape) != 1 else [int(one) for one in tensor.numpy()]


def number(value: ir.Value | None) -> float | None:
    """A single number that stands in the graph itself, not in a weight file."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or len(tensor.shape):
        return None
    return float(tensor.numpy())


def is_all_ones(value: ir.Value) -> bool:
    """Whether a tensor that stands in the graph itself holds nothing but ones."""
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and not isinstance(tensor, ir.ExternalTensor) and bool(np.all(tensor.numpy() == 1))


def length(value: ir.Value) -> int | None:
    """How many numbers a stored vector has, as a layer's bias is."""
    if not value.is_initializer() or value.shape is None or value.shape.rank() != 1:
        return None
    return value.shape[0] if isinstance(value.shape[0], int) else None


def is_bias(value: ir.Value) -> bool:
    """Whether a value is a stored vector."""
    return length(value) is not None


def heads(shape: ir.Value) -> tuple[int, int] | None:
    """Heads and their size in a shape (B, S, heads, size) that is put together in the graph, where both are known."""
    node = shape.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 4:
        return None
    count, size = (integers(value) for value in node.inputs[2:])
    return (count[0], size[0]) if count and size and min(count[0], size[0]) > 0 else None


def has_row_per_sample(value: ir.Value) -> bool:
    """Whether a value is (B, 1, C), with a number added or not.

    Such rows are made of (B, C), or are one of n that are split off (B, n, C): the sum of a table (1, n, C) and what
    the timestep says.
    """
    node = value.producer()
    if node is not None and node.op_type == "Add" and node.inputs[0] is not None:
        node = node.inputs[0].producer() if number(node.inputs[1]) is not None else None
    if node is None:
        return False
    if node.op_type == "Unsqueeze":
        return integers(node.inputs[1]) == [1]
    if node.op_type != "Split" or node.attributes.get_int("axis", 0) != 1 or node.inputs[0] is None:
        return False
    split = node.inputs[0].producer()
    return (
        split is not None
        and split.op_type == "Add"
        and any(
            one is not None
            and one.is_initializer()
            and one.shape is not None
            and one.shape.rank() == 3
            and one.shape[:2] == (1, len(node.outputs))
            for one in split.inputs
        )
    )


def attributes_of(value: ir.Value) -> dict[str, Any]:
    """The attributes of the node that makes a value."""
    node = value.producer()
    return {} if node is None else {name: attribute.value for name, attribute in node.attributes.items()}


def epsilon_of(normed: ir.Value) -> float:
    """What a norm adds before it takes the root; 1e-5 where it does not say, by ONNX."""
    return float(attributes_of(normed).get("epsilon", 1e-5))


def fits_kernels(channels: int | None) -> bool:
    """Whether the kernels take so many channels."""
    return channels is not None and channels % CHANNELS == 0


def width_of(value: ir.Value) -> int | None:
    """The channels of a tensor that goes into a matrix product, which its weights (C, …) tell."""
    for user, index in value.uses():
        if user.op_type == "MatMul" and index == 0 and (weight := user.inputs[1]) is not None and weight.shape:
            return weight.shape[0] if isinstance(weight.shape[0], int) else None
    return None


def is_product(value: ir.Value) -> bool:
    """Whether a value is a product of matrices, or a number of times one."""
    node = value.producer()
    if node is not None and node.op_type == "Mul" and node.inputs[1] is not None:
        node = node.inputs[0].producer() if node.inputs[0] and number(node.inputs[1]) is not None else None
    return node is not None and node.op_type == "MatMul"


def is_linear(product: ir.Value, bias: ir.Value) -> bool:
    """Whether two values are what a linear layer adds, of channels that the kernels take."""
    node = product.producer()
    with_branch = node is not None and node.op_type == "Add" and all(one and is_product(one) for one in node.inputs)
    return fits_kernels(length(bias)) and (with_branch or is_product(product))


def any_of(op, operator: str, name: str):
    """The pattern of one of this domain's operators, whatever its inputs."""
    return getattr(op, operator)(_allow_other_inputs=True, _outputs=[name], _domain=DOMAIN)
