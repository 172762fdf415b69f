"""What the GPU backends share: samples' state in GPU memory, which every level's engine reads and writes in place.

A `DeviceWorkspace` holds the buffers of a batch at a size. Every level's engine and the step graph are bound to their
addresses once, so that a switch of level moves no data. The host sends a few numbers for each sample at a step and gets
back the deviations, a few kilobytes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from threading import RLock

from numpy.typing import DTypeLike

from ddit.runtime.backends.base import Array, Backend, Engine, FloatArray, Workspace
from ddit.runtime.backends.device.cuda import CudaGraph, DeviceArray, DeviceBlock, DeviceSpan, Gpu
from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.manifest import GraphInfo, TensorSpec
from ddit.runtime.bundle.names import GATE_INPUT, NEXT
from ddit.runtime.shapes import infer
from ddit.runtime.step import Program

# Workspaces that no sample is in are kept, so that the next group of their size starts with bound engines. Where many
# requests come and go, groups of every size up to the largest batch do.
KEPT_WORKSPACES = 32
KEPT_SHARE = 0.02  # of the memory that was free at the start, at most
KEPT_SHAPES = 2  # of an engine that is fed from the host

# A step of so many tokens or fewer takes less time on the GPU than its launches on the host. On an H200, FLUX.1-dev
# gains 17 % from a replayed graph at 256 image tokens, 7 % at 1024 and nothing at 4096.
REPLAY_TOKENS = 2048


class Bound(ABC):
    """An engine with its shapes and addresses set."""

    @abstractmethod
    def enqueue(self) -> None:
        """Queue one run on the GPU's stream. Raises `BackendError`."""


class DeviceEngine(Engine):
    """A graph that can be bound to GPU memory."""

    def __init__(self, backend: "DeviceBackend", info: GraphInfo):
        self.backend = backend
        self.info = info
        self._kept: dict[tuple[tuple[int, ...], ...], tuple[dict[str, DeviceArray], Bound]] = {}

    @abstractmethod
    def dtype(self, spec: TensorSpec) -> DTypeLike:
        """The type in which the engine takes or gives a tensor."""

    @abstractmethod
    def bind(self, arrays: Mapping[str, DeviceArray], *, replayed: bool) -> Bound:
        """Set the shapes and addresses of all inputs and outputs. Raises `UsageError` for sizes that do not fit.

        ``replayed``: the run will be repeated often, so preparing a CUDA graph pays.
        """

    def run(self, inputs: Mapping[str, Array]) -> dict[str, FloatArray]:
        """Run on arrays of the host."""
        with self.backend.busy:
            shapes = tuple(inputs[spec.name].shape for spec in self.info.inputs)
            arrays, bound = self._kept.pop(shapes) if shapes in self._kept else self._prepare(shapes)
            for name, values in inputs.items():
                arrays[name].fill(values)
            bound.enqueue()
            for spec in self.info.outputs:
                arrays[spec.name].fetch()
            self.backend.gpu.synchronize()
            self._kept[shapes] = arrays, bound
            if len(self._kept) > KEPT_SHAPES:
                del self._kept[next(iter(self._kept))]
            return {spec.name: arrays[spec.name].fetched() for spec in self.info.outputs}

    def _prepare(self, shapes: tuple[tuple[int, ...], ...]) -> tuple[dict[str, DeviceArray], Bound]:
        sizes = infer((spec.shape for spec in self.info.inputs), shapes)
        arrays = {
            spec.name: self.backend.gpu.array(spec.resolve(sizes), self.dtype(spec))
            for spec in (*self.info.inputs, *self.info.outputs)
        }
        return arrays, self.bind(arrays, replayed=False)


class DeviceBackend(Backend):
    """A backend whose engines share one GPU, one stream and the memory of a run.

    Runs of several threads take turns, step by step.
    """

    captures = False  # whether steps are captured here; ONNX Runtime captures by itself

    def __init__(self, bundle: Bundle):
        super().__init__(bundle)
        self.gpu = Gpu()
        self._free_at_start = self.gpu.free_bytes()
        self.busy = RLock()
        self._workspaces: list[DeviceWorkspace] = []

    def __str__(self) -> str:
        return f"{self.name} on {self.gpu.name}"

    def memory_used(self) -> int:
        """Bytes of GPU memory taken since the backend was opened, by whatever program."""
        return self._free_at_start - self.gpu.free_bytes()

    @abstractmethod
    def _open(self, graph: str) -> DeviceEngine: ...

    def device_engine(self, graph: str) -> DeviceEngine:
        """The engine of a graph."""
        engine = self.engine(graph)
        assert isinstance(engine, DeviceEngine)
        return engine

    def workspace(self, buffers: Mapping[str, TensorSpec], sizes: Mapping[str, int]) -> "DeviceWorkspace":
        """A workspace of a size that nobody uses; one that was given back has bound engines already."""
        with self.busy:
            for workspace in self._workspaces:
                if workspace.sizes == sizes and workspace.names == buffers.keys():
                    self._workspaces.remove(workspace)
                    return workspace
            return DeviceWorkspace(self, buffers, sizes)

    def release(self) -> None:
        """Of kept workspaces too, which are bound to engines."""
        with self.busy:
            self.gpu.synchronize()
            self._workspaces.clear()
            super().release()

    def give_back(self, workspace: Workspace) -> None:
        """Keep the latest for the groups to come, as many as take little memory, and one in any case."""
        assert isinstance(workspace, DeviceWorkspace)
        with self.busy:
            self._workspaces = [workspace, *self._workspaces][:KEPT_WORKSPACES]
            while sum(kept.nbytes for kept in self._workspaces[1:]) > KEPT_SHARE * self._free_at_start:
                self._workspaces.pop()


class DeviceWorkspace(Workspace):
    """Buffers in GPU memory, and the programs that are bound to them.

    Buffers that are copied together lie side by side: the state and its ``next_`` twins, what the host sends at a step,
    and what it gets back. Every copy that is queued costs the host some microseconds.
    """

    def __init__(self, backend: DeviceBackend, buffers: Mapping[str, TensorSpec], sizes: Mapping[str, int]):
        super().__init__(sizes)
        self.backend = backend
        self.arrays: dict[str, DeviceArray] = {}
        self.names = buffers.keys()
        self._shapes = {name: spec.resolve(sizes) for name, spec in buffers.items()}
        self._bound: dict[str, BoundProgram] = {}
        # a gate's is as large as several of the others together, and is made when a sample needs it
        state = tuple(name for name in buffers if NEXT + name in buffers and name != GATE_INPUT)
        self.blocks = {names: self._block(names) for names in (state, tuple(NEXT + name for name in state))}

    @property
    def nbytes(self) -> int:
        """Of its buffers so far."""
        return sum(array.nbytes for array in self.arrays.values())

    def array(self, name: str) -> DeviceArray:
        """A buffer, made when it is first asked for."""
        if name not in self.arrays:
            self.arrays[name] = self.backend.gpu.array(self._shapes[name])
        return self.arrays[name]

    def together(self, names: tuple[str, ...]) -> Sequence[DeviceSpan]:
        """The fewest things to copy for these buffers: one block, unless some of them lie elsewhere already."""
        if names not in self.blocks and not any(name in self.arrays for name in names):
            self.blocks[names] = self._block(names)
        return [self.blocks[names]] if names in self.blocks else [self.array(name) for name in names]

    def _block(self, names: Sequence[str]) -> DeviceBlock:
        block = DeviceBlock(self.backend.gpu, {name: self._shapes[name] for name in names})
        self.arrays |= block.arrays
        return block

    def write(self, name: str, row: int, values: FloatArray) -> None:
        """Copy a row from the host."""
        with self.backend.busy:
            self.array(name).fill_row(row, values)

    def read(self, name: str, row: int) -> FloatArray:
        """Copy a row to the host."""
        with self.backend.busy:
            return self.array(name).download_row(row)

    def take(self, names: Sequence[str], row: int, source: Workspace, source_row: int, count: int = 1) -> None:
        """Copy rows on the GPU."""
        assert isinstance(source, DeviceWorkspace)
        with self.backend.busy:
            for name in names:
                self.array(name).copy_rows(row, source.array(name), source_row, count)

    def run(self, program: Program, inputs: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        """Queue the step and wait for its results."""
        with self.backend.busy:
            if program.name not in self._bound:
                self._bound[program.name] = BoundProgram(self, program, tuple(inputs))
            for name, values in inputs.items():
                self.arrays[name].stage(values)
            self._bound[program.name].enqueue()
            self.backend.gpu.synchronize()
            return {name: self.arrays[name].fetched() for name in program.results}


class BoundProgram:
    """A program whose engines are bound to a workspace; replayed as one CUDA graph where that pays."""

    def __init__(self, workspace: DeviceWorkspace, program: Program, inputs: tuple[str, ...]):
        backend = workspace.backend
        self._gpu = backend.gpu
        self._tables = {name: backend.gpu.upload(values) for name, values in program.tables.items()}
        self._sent = workspace.together(inputs)
        twins = tuple(NEXT + name for name in program.state)
        self._moved = [*zip(workspace.together(program.state), workspace.together(twins), strict=True)]
        self._fetched = workspace.together(program.results) if program.results else []
        replayed = program.tokens <= REPLAY_TOKENS
        self._captures = backend.captures and replayed
        self._calls = []
        for call in program.calls:
            buffers = {tensor: buffer for side in (call.inputs, call.outputs) for tensor, buffer in side.items()}
            arrays = {tensor: self._tables.get(name) or workspace.array(name) for tensor, name in buffers.items()}
            self._calls.append(backend.device_engine(call.graph).bind(arrays, replayed=replayed))
        self._ran = False
        self._graph: CudaGraph | None = None

    def enqueue(self) -> None:
        """Queue the step. The first run is a plain one: engines prepare themselves in it, which cannot be captured."""
        if self._captures and self._ran and self._graph is None:
            with self._gpu.capture() as graph:
                self._queue()
            self._graph = graph
        if self._graph is not None:
            self._graph.launch()
        else:
            self._queue()
            self._ran = True

    def _queue(self) -> None:
        for array in self._sent:
            array.send()
        for call in self._calls:
            call.enqueue()
        for array, after in self._moved:
            array.copy_from(after)
        for array in self._fetched:
            array.fetch()
