"""Lower a graph from opset 18 to 17, the newest that TensorRT 8.6 reads.

torch exports no older opset than 18, and `onnx.version_converter` cannot take these graphs down: it has no rule for
``Split`` and leaves attributes that opset 17 does not know. What occurs in exported graphs is lowered here; anything
else that opset 18 brought or changed is an error.
"""

import onnx_ir as ir
from onnx import defs

from ddit.runtime.errors import ModelError

TRACED = 18
LOWERED = 17
IR_VERSION = 8  # of ONNX 1.12, which brought opset 17


def lower_to_opset17(model: ir.Model, name: str) -> None:
    """Rewrite an opset 18 model in place; constants come as nodes.

    Weights need no values, but ranks and the sizes that are split must be known. Raises `ModelError`, which calls the
    graph ``name``, for an operator that has no equivalent at opset 17.
    """
    for node in list(model.graph.all_nodes()):
        try:
            if node.domain == "" and node.op_type in RULES:
                RULES[node.op_type](node)
            elif not _unchanged(node):
                raise ValueError("opset 17 has no such operator or an older one")
        except ValueError as error:
            raise ModelError(
                f"{name} cannot be lowered to opset {LOWERED}: {node.op_type}: {error}; "
                f"export at opset {TRACED} or newer"
            ) from None
    model.opset_imports[""] = LOWERED
    model.ir_version = IR_VERSION


def _unchanged(node: ir.Node) -> bool:
    """Whether a node means the same at both opsets."""
    if not defs.has(node.op_type, TRACED, node.domain):
        return False
    return defs.get_schema(node.op_type, TRACED, node.domain).since_version <= LOWERED


def _lower_shape(node: ir.Node) -> None:
    """Some dimensions: ``Gather`` picks them. Opset 17 has ``start`` and ``end``, but TensorRT 8.6 reads neither."""
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
    node.attributes.pop("start", None)
    node.attributes.pop("end", None)
    if start == 0 and end is None:
        return
    (source,) = node.inputs
    assert source is not None
    if source.shape is None:
        raise ValueError("the rank of its input is not known")
    dimensions = list(range(source.shape.rank()))
    chosen = dimensions[start:end]  # out of bounds ends are cut as ONNX cuts them
    if chosen == dimensions:
        return
    whole = ir.node("Shape", [source])
    indices = _constant(chosen)
    some = ir.node("Gather", [whole.outputs[0], indices.outputs[0]], {"axis": 0})
    _replace(node, [whole, indices, some])


def _lower_split(node: ir.Node) -> None:
    """A split into ``num_outputs`` parts: opset 17 has equal parts only, in opset 18 the last may be smaller."""
    node.attributes.pop("num_outputs", None)
    if len(node.inputs) == 2:  # the sizes are given
        return
    (source,) = node.inputs
    assert source is not None
    size = None if source.shape is None else source.shape[node.attributes.get_int("axis", 0)]
    if not isinstance(size, int):
        raise ValueError("the size that it splits is not known")
    parts = len(node.outputs)
    if size % parts == 0:
        return
    most = -(-size // parts)
    last = size - most * (parts - 1)
    if last < 0:
        raise ValueError(f"{size} cannot be split into {parts}")
    sizes = _constant([most] * (parts - 1) + [last])
    assert node.graph is not None
    node.graph.insert_before(node, sizes)
    node.resize_inputs(2)
    node.replace_input_with(1, sizes.outputs[0])


def _lower_reduce(node: ir.Node) -> None:
    """The axes, an input since 18, become an attribute."""
    keeps_all = node.attributes.get_int("noop_with_empty_axes", 0)
    node.attributes.pop("noop_with_empty_axes", None)
    given = node.inputs[1] if len(node.inputs) == 2 else None
    axes: list[int] = []
    if given is not None:
        tensor = ir.convenience.get_const_tensor(given)
        if tensor is None:
            raise ValueError("its axes are not constant")
        axes = tensor.numpy().tolist()
    if not axes and keeps_all:
        _replace(node, [ir.node("Identity", node.inputs[:1])])
        return
    node.resize_inputs(1)
    if axes:  # without, both reduce over all
        node.attributes["axes"] = ir.AttrInt64s("axes", axes)


def _lower_pad(node: ir.Node) -> None:
    """Remove the input that opset 18 added, the padded axes, where it is not given: all are padded then."""
    if len(node.inputs) == 4:
        if node.inputs[3] is not None:
            raise ValueError("it names its axes")
        node.resize_inputs(3)


def _lower_resize(node: ir.Node) -> None:
    """Remove the attributes that opset 18 added, where they have their default values."""
    for name, nothing in (("antialias", 0), ("keep_aspect_ratio_policy", "stretch"), ("axes", None)):
        attribute = node.attributes.pop(name, None)
        if attribute is not None and attribute.value != nothing:
            raise ValueError(f"{name} = {attribute.value}")


RULES = {
    "Pad": _lower_pad,
    "ReduceL2": _lower_reduce,
    "ReduceMax": _lower_reduce,
    "ReduceMean": _lower_reduce,
    "ReduceMin": _lower_reduce,
    "ReduceProd": _lower_reduce,
    "Resize": _lower_resize,
    "Shape": _lower_shape,
    "Split": _lower_split,
}


def _constant(values: list[int]) -> ir.Node:
    return ir.node("Constant", [], {"value": ir.tensor(values, dtype=ir.DataType.INT64)})


def _replace(node: ir.Node, nodes: list[ir.Node]) -> None:
    """Replace a node by others; the last one's output replaces its own."""
    assert node.graph is not None
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], nodes, node.outputs, nodes[-1].outputs)
