"""LoRA branches → merged weights, in the graph that a TensorRT engine is built from. Needs no torch.

A bundle keeps every LoRA beside the trunk, so that sessions can share the trunk's weights. A TensorRT engine owns a
copy of its weights anyway: merged, the branch costs neither time nor memory there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True)
class Branch:
    """The nodes of one adapted linear layer, ``linear(x) + scale · ((x A) B)``."""

    matmul: ir.Node  # of the linear layer; its weight is the trunk's
    down: ir.Node
    up: ir.Node
    scaling: ir.Node
    total: ir.Node
    base: ir.Value  # what the layer gives without its branch

    def weight(self) -> np.ndarray:
        """``W + scale · A B``, (in, out) in the dtype of W; computed in float32."""
        weight = _constant(self.matmul)
        merged = _constant(self.down).astype(np.float32) @ _constant(self.up).astype(np.float32)
        merged *= float(_constant(self.scaling))
        merged += weight
        return merged.astype(weight.dtype)


def merge_lora(model: ir.Model, folder: Path, location: str) -> int:
    """Merge every LoRA branch of a level's graph in place; returns their number.

    The merged weights are written to the file ``location``, relative to the bundle's ``folder``, one at a time, and
    referenced there; without a branch there is no file. A branch of another form than the exporter's stays as it is.
    """
    branches = list(_branches(model.graph))
    if not branches:
        return 0
    with (folder / location).open("wb") as file:
        for number, branch in enumerate(branches):
            weight = branch.weight()
            tensor = ir.ExternalTensor(
                location,
                file.tell(),
                weight.nbytes,
                ir.DataType.from_numpy(weight.dtype),
                shape=ir.Shape(weight.shape),
                name=f"merged.{number}",
                base_dir=folder,
            )
            file.write(weight.tobytes())
            _replace(model.graph, branch, tensor)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]
    return len(branches)


def _branches(graph: ir.Graph) -> Iterator[Branch]:
    """The branches, found by their weights' names, which are peft's."""
    for down in graph:
        if not _is_product_with(down, ".lora_A."):
            continue
        up = _only_user(down)
        scaling = _only_user(up)
        total = _only_user(scaling)
        if not (_is_product_with(up, ".lora_B.") and scaling and scaling.op_type == "Mul" and total):
            continue
        assert up is not None
        for base in total.inputs:
            linear = base.producer() if base else None
            if base and linear and linear is not scaling:
                matmul = linear if linear.op_type == "MatMul" else _producer(linear, "MatMul")  # before the bias
                if matmul and matmul.inputs[0] is down.inputs[0]:
                    yield Branch(matmul, down, up, scaling, total, base)


def _is_product_with(node: ir.Node | None, part: str) -> bool:
    """Whether a node multiplies by a weight with such a name."""
    return bool(node and node.op_type == "MatMul" and (weight := node.inputs[1]) and part in (weight.name or ""))


def _producer(node: ir.Node, operator: str) -> ir.Node | None:
    """The first such operator among those that make a node's inputs."""
    makers = (value.producer() for value in node.inputs if value)
    return next((maker for maker in makers if maker and maker.op_type == operator), None)


def _only_user(node: ir.Node | None) -> ir.Node | None:
    """The node that alone uses a node's output."""
    uses = list(node.outputs[0].uses()) if node else []
    return uses[0].node if len(uses) == 1 else None


def _constant(node: ir.Node) -> np.ndarray:
    """The right one of two inputs, which is a constant."""
    value = node.inputs[1]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _replace(graph: ir.Graph, branch: Branch, tensor: ir.ExternalTensor) -> None:
    """Let the linear layer use a merged weight, and remove its branch."""
    weight = ir.Value(
        name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(weight)
    branch.matmul.replace_input_with(1, weight)
    branch.total.outputs[0].replace_all_uses_with(branch.base)
    graph.remove((branch.total, branch.scaling, branch.up, branch.down), safe=True)
