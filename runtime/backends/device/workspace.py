"""What the GPU backends share: a run's state in GPU memory, which every level's engine reads and writes in place.

A `Workspace` holds the buffers of a batch at a size. Every level's engine and the step graph are bound to their
addresses once, so that a switch of level moves no data; the host sees the deviations only, a few kilobytes a step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock

import numpy as np
from numpy.typing import DTypeLike

from ddit.runtime.backends.base import (
    DEVIATION,
    STATE,
    Array,
    Backend,
    Denoiser,
    Detail,
    Engine,
    FloatArray,
    Start,
    deviations,
)
from ddit.runtime.backends.device.cuda import CudaGraph, DeviceArray, Gpu
from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.manifest import GraphInfo, TensorSpec
from ddit.runtime.shapes import infer

CONSTANTS = ("rope_cos", "rope_sin", "refresh", "carry")  # inputs that depend on the level and the carried share only
KEPT_WORKSPACES = 4  # of runs that are over; the next run of the same size starts with bound engines
KEPT_SHAPES = 2  # of an engine that is fed from the host

# A step of so many tokens or fewer takes less time on the GPU than its launches on the host. On an H200, FLUX.1-dev
# gains 17 % from a replayed graph at 256 image tokens, 7 % at 1024 and nothing at 4096.
REPLAY_TOKENS = 2048

Sizes = dict[str, int]


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
        self._workspaces: list[Workspace] = []

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

    @contextmanager
    def denoiser(self, start: Start) -> Iterator[Denoiser]:
        """The state of a new run in GPU memory; its buffers serve the next run of the same size."""
        denoiser = DeviceDenoiser(self, start)
        yield denoiser
        self._keep(denoiser.workspaces())

    def workspace(self, sizes: Sizes) -> "Workspace":
        """A workspace of a size that no run is using."""
        with self.busy:
            for workspace in self._workspaces:
                if workspace.sizes == sizes:
                    self._workspaces.remove(workspace)
                    return workspace
            return Workspace(self, sizes)

    def _keep(self, workspaces: Sequence["Workspace"]) -> None:
        with self.busy:
            self._workspaces = [*workspaces, *self._workspaces][:KEPT_WORKSPACES]


class Workspace:
    """The buffers of a batch at a size, by the names of the graphs' tensors, and the engines bound to them."""

    def __init__(self, backend: DeviceBackend, sizes: Sizes):
        self.backend = backend
        self.sizes = sizes
        manifest = backend.bundle.manifest
        level = manifest.graphs[manifest.level(manifest.native).graph]
        step = manifest.graphs["step"]
        # the levels' tensors differ in nothing but those that every `Step` brings
        specs = {spec.name: spec for graph in (level, step) for spec in (*graph.inputs, *graph.outputs)}
        self.arrays = {
            name: backend.gpu.array(spec.resolve(sizes)) for name, spec in specs.items() if name not in CONSTANTS
        }
        self.deviations = {name: array for name, array in self.arrays.items() if name.startswith(DEVIATION)}
        self._steps: dict[tuple[int, float], Step] = {}

    def run(self, patch: int, share: float, constants: Callable[[], Mapping[str, FloatArray]]) -> dict[int, FloatArray]:
        """One denoising step of the whole batch at a level; returns the deviations by patch.

        ``share`` is that of the carried detail; ``constants`` gives `CONSTANTS`.
        """
        if (patch, share) not in self._steps:
            for other in [key for key in self._steps if key[0] == patch and 0 < key[1] != share]:
                del self._steps[other]  # a share that a run before was given
            self._steps[patch, share] = Step(self, patch, constants())
        self._steps[patch, share].enqueue()
        self.backend.gpu.synchronize()
        return deviations({name: array.fetched() for name, array in self.deviations.items()})


class Step:
    """A level's engine and the step graph, bound to a workspace; replayed as one CUDA graph where that pays."""

    def __init__(self, workspace: Workspace, patch: int, constants: Mapping[str, FloatArray]):
        backend = workspace.backend
        manifest = backend.bundle.manifest
        self._arrays = workspace.arrays | {name: backend.gpu.upload(values) for name, values in constants.items()}
        self._fetched = list(workspace.deviations.values())
        self._gpu = backend.gpu
        tokens = workspace.sizes["H"] * workspace.sizes["W"] // patch**2
        replayed = tokens <= REPLAY_TOKENS
        self._captures = backend.captures and replayed
        self._level = _bind(backend, manifest.level(patch).graph, self._arrays, replayed=replayed)
        self._update = _bind(backend, "step", self._arrays, replayed=replayed)
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
        self._level.enqueue()
        self._update.enqueue()
        for name in STATE:
            self._arrays[name].copy_from(self._arrays[f"next_{name}"])
        for array in self._fetched:
            array.fetch()


def _bind(backend: DeviceBackend, graph: str, arrays: Mapping[str, DeviceArray], *, replayed: bool) -> Bound:
    engine = backend.device_engine(graph)
    names = [spec.name for spec in (*engine.info.inputs, *engine.info.outputs)]
    return engine.bind({name: arrays[name] for name in names}, replayed=replayed)


class DeviceDenoiser(Denoiser):
    """A run's state in a workspace of the whole batch; samples that part ways are copied to a smaller one."""

    def __init__(self, backend: DeviceBackend, start: Start):
        self._backend = backend
        self._rotary = start.rotary
        self._detail = Detail(backend.bundle.manifest, start.carry)
        self._rows = (*STATE, *start.conditions)
        batch, _, height, width = start.latent.shape
        self._sizes = {"B": batch, "H": height, "W": width, "L": start.conditions["context"].shape[1]}
        self._batch = batch
        with backend.busy:
            self._home = backend.workspace(self._sizes)
            self._groups: dict[int, Workspace] = {}
            arrays = self._home.arrays
            for name, values in {"latent": start.latent, **start.conditions}.items():
                arrays[name].fill(values)
            for name in STATE[1:]:
                arrays[name].clear()
            gpu, sigmas = backend.gpu, np.asarray(start.sigmas, dtype=np.float32)
            # every step's row is as long as the batch, so that a group of any size finds its values side by side
            self._times = {
                "timestep": gpu.upload(np.repeat(sigmas[:-1, None], batch, axis=1)),
                "dt": gpu.upload(np.repeat(np.diff(sigmas)[:, None], batch, axis=1)),
            }

    def step(self, number: int, patch: int, members: Sequence[int]) -> dict[int, FloatArray]:
        """Run a step on the members' rows."""
        with self._backend.busy:
            whole = len(members) == self._batch
            workspace = self._home if whole else self._group(len(members))
            for name, times in self._times.items():
                target = workspace.arrays[name]
                self._backend.gpu.copy(target.address, times.address + number * times.row_bytes, target.nbytes)
            if not whole:
                for name in self._rows:
                    for row, member in enumerate(members):
                        workspace.arrays[name].copy_row(row, self._home.arrays[name], member)
            share = self._detail.share(patch, members)
            found = workspace.run(patch, share, lambda: self._constants(patch, share, len(members)))
            if not whole:
                for name in STATE:
                    for row, member in enumerate(members):
                        self._home.arrays[name].copy_row(member, workspace.arrays[name], row)
            return found

    def _constants(self, patch: int, share: float, batch: int) -> dict[str, FloatArray]:
        cos, sin = self._rotary(patch)
        return {"rope_cos": cos, "rope_sin": sin, **self._detail.inputs(patch, share, batch)}

    def latent(self) -> FloatArray:
        """The samples' latents."""
        with self._backend.busy:
            return self._home.arrays["latent"].download()

    def workspaces(self) -> list[Workspace]:
        """Everything that this run has taken."""
        return [self._home, *self._groups.values()]

    def _group(self, size: int) -> Workspace:
        if size not in self._groups:
            self._groups[size] = self._backend.workspace({**self._sizes, "B": size})
        return self._groups[size]
