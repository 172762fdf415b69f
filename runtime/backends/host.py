"""A workspace as arrays of the host, for engines that take and give those."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ddit.runtime.backends.base import FloatArray, Workspace
from ddit.runtime.bundle.manifest import TensorSpec
from ddit.runtime.bundle.names import NEXT
from ddit.runtime.step import Program

if TYPE_CHECKING:
    from ddit.runtime.backends.base import Backend


class HostWorkspace(Workspace):
    """Buffers as NumPy arrays. An engine's outputs become buffers as they are, without a copy."""

    def __init__(self, backend: "Backend", buffers: Mapping[str, TensorSpec], sizes: Mapping[str, int]):
        super().__init__(sizes)
        self._backend = backend
        self._shapes = {name: spec.resolve(sizes) for name, spec in buffers.items()}
        self._arrays: dict[str, FloatArray] = {}

    def write(self, name: str, row: int, values: FloatArray) -> None:
        """Set a row; the buffer is made when it is first written to."""
        if name not in self._arrays:
            self._arrays[name] = np.zeros(self._shapes[name], dtype=np.float32)
        self._arrays[name][row] = values

    def read(self, name: str, row: int) -> FloatArray:
        """A copy of a row."""
        values: FloatArray = self._arrays[name][row].copy()
        return values

    def take(self, names: Sequence[str], row: int, source: Workspace, source_row: int, count: int = 1) -> None:
        """Copy rows."""
        assert isinstance(source, HostWorkspace)
        for name in names:
            for number in range(count):
                self.write(name, row + number, source._arrays[name][source_row + number])

    def run(self, program: Program, inputs: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        """Run the calls one after another."""
        buffers = {**self._arrays, **program.tables, **inputs}
        for call in program.calls:
            engine = self._backend.engine(call.graph)
            outputs = engine.run({tensor: buffers[buffer] for tensor, buffer in call.inputs.items()})
            buffers |= {call.outputs[tensor]: value for tensor, value in outputs.items()}
        for name in program.state:
            self._arrays[name] = buffers[NEXT + name]
        return {name: buffers[name] for name in program.results}
