"""Graphs of a bundle as parts of another graph: their nodes move, their weights go to the outermost graph."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from ddit.exporter.single.rules import DOMAIN, RULES

Values = Mapping[str, ir.Value]


class Outermost:
    """What all graphs of a model share: the initializers of the outermost one, opsets and functions."""

    def __init__(self, folder: Path):
        self.initializers: dict[str, ir.Value] = {}
        self.opsets: dict[str, int] = {}
        self.functions: dict[ir.OperatorIdentifier, ir.Function] = {}  # that the levels' twins call
        self._folder = folder  # of the bundle's graphs

    def constant(self, value: NDArray[np.generic] | np.generic | int | list[int], name: str = "") -> ir.Value:
        """A constant, int64 where it is made of Python's whole numbers; one name is one constant."""
        array = np.asarray(value)
        name = name or f"constant {array.tolist()} {array.dtype}"
        if name not in self.initializers:
            tensor = ir.tensor(array, name=name)
            self.initializers[name] = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        return self.initializers[name]

    def load(self, file: str) -> ir.Graph:
        """A bundle's graph."""
        model = ir.load(self._folder / file)
        for domain, version in model.opset_imports.items():
            self.opsets.setdefault(domain, version)
        self.functions |= model.functions
        return model.graph

    def adopt(self, value: ir.Value, graph: str) -> ir.Value:
        """A graph's initializer here. A tensor of a weight file is here once, whatever graphs point to it."""
        tensor = value.const_value
        owner = tensor.location if isinstance(tensor, ir.ExternalTensor) else graph
        name = f"{owner}/{value.name}"
        if name not in self.initializers:
            value.name = name
            self.initializers[name] = value
        return self.initializers[name]


class Part:
    """The nodes of one graph, in order."""

    def __init__(self, outermost: Outermost):
        self.outermost = outermost
        self.nodes: list[ir.Node] = []
        self._tape = Tape()

    def op(self, kind: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        """A node with one output."""
        value = self._tape.op(kind, inputs, attributes)  # type: ignore[arg-type]
        self._take(value)
        return value

    def ops(self, kind: str, inputs: Sequence[ir.Value | None], outputs: int, **attributes: object) -> list[ir.Value]:
        """A node with several outputs."""
        values = list(self._tape.op_multi_out(kind, inputs, attributes, num_outputs=outputs))  # type: ignore[arg-type]
        self._take(values[0])
        return values

    def rule(self, name: str, *inputs: ir.Value) -> list[ir.Value]:
        """A call of one of `ddit.exporter.single.rules`."""
        outputs = len(RULES[name].function_ir.outputs)
        values = list(self._tape.op_multi_out(name, inputs, num_outputs=outputs, domain=DOMAIN))
        self._take(values[0])
        return values

    def graph(self, name: str, file: str, inputs: Values) -> Values:
        """All nodes of a bundle's graph, on the values of its inputs' names; its outputs by name."""
        graph = self.outermost.load(file)
        for key, value in list(graph.initializers.items()):
            del graph.initializers[key]
            adopted = self.outermost.adopt(value, name)
            if adopted is not value:
                value.replace_all_uses_with(adopted)
        outputs = {str(value.name): value for value in graph.outputs}
        graph.outputs.clear()
        for value in list(graph.inputs):
            value.replace_all_uses_with(inputs[str(value.name)])
        nodes = list(graph)
        graph.remove(nodes)
        for node in nodes:
            node.name = f"{name}/{node.name}"
            for value in node.outputs:
                value.name = f"{name}/{value.name}"
        self.nodes += nodes
        return outputs

    def choose(self, name: str, condition: ir.Value, then: "Branch", otherwise: "Branch") -> ir.Value:
        """The first branch's value where the condition holds, else the other one's. Only that branch is run."""
        branches = {
            f"{which}_branch": ir.Graph([], [value], nodes=part.nodes, name=f"{name}, {which}")
            for which, (part, value) in (("then", then), ("else", otherwise))
        }
        return self.op("If", condition, **branches)

    def _take(self, value: ir.Value) -> None:
        node = value.producer()
        assert node is not None
        self.nodes.append(node)


Branch = tuple[Part, ir.Value]
