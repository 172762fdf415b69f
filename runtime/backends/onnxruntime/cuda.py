"""ONNX Runtime's CUDA provider on the GPU loop: bound buffers, one stream, shared weights.

The weights of the levels lie on the GPU once: every session is given the same buffers as its initializers.
"""

import ctypes
import json
import logging
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ddit.runtime.backends.device.cuda import BFloat16, DeviceArray, DeviceMemory, Stream
from ddit.runtime.backends.device.workspace import Bound, DeviceBackend, DeviceEngine
from ddit.runtime.backends.onnxruntime import kernels
from ddit.runtime.backends.onnxruntime.host import (
    CUDA,
    FLOAT8,
    check_names,
    check_provider,
    engine_errors,
    import_onnxruntime,
    require_twins,
    session_options,
)
from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.manifest import Dtype, GraphInfo, TensorSpec
from ddit.runtime.bundle.names import FP8
from ddit.runtime.errors import BackendError, BundleError

log = logging.getLogger(__name__)

DEVICE = "cuda"
NUMPY_TYPES = {"float32": np.float32, "int64": np.int64}
# by safetensors' names; FP8 goes into the graph as bytes
STORED_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "F8_E4M3": np.uint8}
ALIGNMENT = 256  # of every weight, as cudaMalloc aligns: kernels read several numbers at once
NO_GRAPH = "-1"
CAPTURED = 128  # CUDA graphs of a level: ONNX Runtime keeps each as long as the session
CUDNN = "cudnn64_9.dll" if sys.platform == "win32" else "libcudnn.so.9"
CUDNN_ATTENTION = (9, 3)  # the first cuDNN whose attention ONNX Runtime takes
# What computes sizes runs on the host by right, so that these say nothing; a level has thousands of others.
SIZE_OPERATORS = frozenset(
    ("Shape", "Squeeze", "Unsqueeze", "Reshape", "Concat", "Slice", "Gather", "Add", "Sub", "Mul", "Div", "Cast")
)
NAMED = 3  # nodes of a level that a message names
_graph_ids = count(1)
_numbers = count()


class Sessions:
    """All of ONNX Runtime's objects that use the stream. They must go before it: bindings, then sessions, then weights.

    The garbage collector keeps to no order, and a session that waits for a destroyed stream takes the process with it.
    So nothing else refers to these objects, and the end of the backend closes them.
    """

    def __init__(self, stream: Stream):
        self.opened: dict[str, Any] = {}  # sessions by graph
        self.weights: dict[str, dict[str, Any]] = {}  # a file's tensors, by name, for all sessions
        self.runs: dict[int, Callable[[], None]] = {}  # a session with its binding
        self._stream: Stream | None = stream

    def close(self) -> None:
        """Let go of everything, the stream included."""
        self.clear()
        self._stream = None

    def clear(self) -> None:
        """Let go of everything, in order."""
        if self._stream is not None:
            self._stream.drain()  # sessions free memory that queued copies may still read
        self.runs.clear()
        self.opened.clear()
        self.weights.clear()


class CudaBound(Bound):
    """A session and its binding to buffers."""

    def __init__(self, sessions: Sessions, run: Callable[[], None], file: str, replay: Callable[[], None] | None):
        """``run`` is waited for. ``replay`` takes its place after the first one; None for the same again."""
        self._sessions = sessions
        self._number = next(_numbers)
        self._file = file
        self._replay = replay
        sessions.runs[self._number] = run
        weakref.finalize(self, sessions.runs.pop, self._number, None).atexit = False

    def enqueue(self) -> None:
        """Queue one run; with a graph id, ONNX Runtime captures the first one and replays it afterwards."""
        runs = self._sessions.runs
        with engine_errors(f"run {self._file}"):
            runs[self._number]()
        if self._replay:
            runs[self._number], self._replay = self._replay, None


class CudaEngine(DeviceEngine):
    """A session on the GPU."""

    def __init__(self, backend: "CudaBackend", info: GraphInfo, sessions: Sessions, graph: str, *, replays: bool):
        super().__init__(backend, info)
        self._sessions = sessions
        self._graph = graph
        self._replays = replays
        self._captured = 0

    def dtype(self, spec: TensorSpec) -> DTypeLike:
        """The graph's own type."""
        return NUMPY_TYPES[spec.dtype]

    def bind(self, arrays: Mapping[str, DeviceArray], *, replayed: bool) -> Bound:
        """Bind inputs and outputs by address. Every binding has a CUDA graph of its own, where graphs are used."""
        ort, session = import_onnxruntime(), self._sessions.opened[self._graph]
        replayed = replayed and self._replays and self._captured < CAPTURED
        self._captured += replayed
        with engine_errors(f"bind {self.info.file}"):
            binding = session.io_binding()
            for specs, bind in ((self.info.inputs, binding.bind_input), (self.info.outputs, binding.bind_output)):
                for spec in specs:
                    array = arrays[spec.name]
                    bind(spec.name, DEVICE, 0, array.dtype.type, array.shape, array.address)
            # A run that is not waited for keeps its pinned memory, and so do all such runs until the session ends,
            # which then may end the process: the memory is freed where CUDA cannot be called (ONNX Runtime 1.31).
            # A replay has none, and whatever reads its outputs is on the same stream.
            waiting, queueing = ort.RunOptions(), ort.RunOptions()
            queueing.add_run_config_entry("disable_synchronize_execution_providers", "1")
            if self._replays:
                graph = str(next(_graph_ids)) if replayed else NO_GRAPH
                for options in (waiting, queueing):
                    options.add_run_config_entry("gpu_graph_id", graph)
        run = partial(session.run_with_iobinding, binding)
        replay = partial(run, queueing) if replayed else None
        return CudaBound(self._sessions, partial(run, waiting), self.info.file, replay)


class CudaBackend(DeviceBackend):
    """One session per graph. Raises `BackendError` without a GPU or enough of its memory, `UsageError` without CUDA."""

    name = "cuda"
    twins = "cuda"  # the backend whose twins of the levels run

    def __init__(self, bundle: Bundle):
        ort = import_onnxruntime()
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN from NVIDIA's packages, where those are installed
        check_provider(CUDA)
        super().__init__(bundle)
        if find_cudnn() is None:
            log.warning("cuDNN 9 is not found, and attention may take twice as long; run: pip install 'ddit[cuda]'")
        self._kernels = kernels.load_kernels(self.gpu.capability)
        manifest = bundle.manifest
        self._levels = {level.graph for level in manifest.levels}
        self._sessions = Sessions(self.gpu.stream_owner)
        weakref.finalize(self, self._sessions.close)
        self._choose_twins()
        more = {name for graph in manifest.graphs.values() for name in graph.twin_weights.get(self.twins, ())}
        self._replaced = {name.removesuffix(FP8) for file in more for name in self._sizes(file) if name.endswith(FP8)}
        needed, free = [self._weight_bytes(graphs) for graphs in self.phases()], self.gpu.free_bytes()
        if max(needed) > free:
            raise BackendError(
                f"GPU memory is too small: the weights need {max(needed) / 1e9:.2f} GB, {free / 1e9:.2f} GB of "
                f"{self.gpu.name} are free; stop other programs, or use --backend cpu"
            )
        if sum(needed) > free:
            self.low_memory = True
            log.warning("GPU memory is short: text encoders and levels take turns, and are loaded anew for each")

    def _weight_bytes(self, graphs: Collection[str]) -> int:
        """What graphs keep on the GPU, a file that several have counted once."""
        manifest = self.bundle.manifest
        files = {file for graph in graphs for file in manifest.graphs[graph].on(self.twins).weights}
        sizes = [self._sizes(file) for file in files] if self._replaced else []
        unused = sum(size for tensors in sizes for name, size in tensors.items() if name in self._replaced)
        return sum(manifest.files[file].size for file in files) - unused

    def release(self) -> None:
        """Of sessions and weights too."""
        with self.busy:
            super().release()
            self._sessions.clear()

    def _choose_twins(self) -> None:
        """Look whether the twins can run here."""

    def _sizes(self, file: str) -> dict[str, int]:
        """Bytes of a weight file's tensors by name."""
        return {name: nbytes for name, *_, nbytes in self._entries(np.memmap(self.bundle.file(file), mode="r"), file)}

    @staticmethod
    def _entries(content: NDArray[np.uint8], path: Path | str) -> list[tuple[str, str, tuple[int, ...], int, int]]:
        try:
            return [*safetensors_entries(content)]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise BundleError(f"{path} is no safetensors file; export the bundle again") from None

    def _open(self, graph: str) -> DeviceEngine:
        info, opened = self.bundle.graph(graph).on(self.twins), self._sessions.opened
        log.info("opening %s with %s", info.file, CUDA)
        replays = graph in self._levels
        weights = (
            {name: value for file in info.weights for name, value in self._on_gpu(file).items()} if replays else {}
        )
        try:
            opened[graph] = self._session(info, weights, replays=replays)
        except BackendError as error:
            if not replays:
                raise
            log.info("%s cannot be captured: %s", info.file, error)  # a part of the graph has to run on the host
            replays = False
            opened[graph] = self._session(info, weights, replays=replays)
            log.warning("%s runs partly on the CPU, and slower for it: %s", info.file, self._on_cpu_line(graph))
        return CudaEngine(self, info, self._sessions, graph, replays=replays)

    def on_cpu(self, graph: str) -> list[str]:
        """The nodes of an opened graph that run on the CPU, by operator and name, without those that compute sizes."""
        return [
            f"{node.op_type} {node.name}"
            for part in self._sessions.opened[graph].get_provider_graph_assignment_info()
            if part.ep_name != CUDA
            for node in part.get_nodes()
            if node.op_type not in SIZE_OPERATORS
        ]

    def _on_cpu_line(self, graph: str) -> str:
        nodes = self.on_cpu(graph)
        rest = f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else ""
        return ", ".join(nodes[:NAMED]) + rest if nodes else "ONNX Runtime does not say what"

    def _session(self, info: GraphInfo, weights: Mapping[str, Any], *, replays: bool) -> Any:
        """A session on our stream that uses ``weights``, on the GPU already, instead of loading its own."""
        options = session_options(plan=False)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")  # for `on_cpu`
        for name, value in weights.items():
            options.add_initializer(name, value)
        if self._kernels:
            with engine_errors(f"load {self._kernels.name}"):
                options.register_custom_ops_library(str(self._kernels))
        provider = {
            "device_id": "0",
            "user_compute_stream": str(self.gpu.stream),
            "arena_extend_strategy": "kSameAsRequested",  # otherwise every piece is as large as all before it
        }
        if replays:
            provider["enable_cuda_graph"] = "1"
        self.bundle.verify_small(info.file)
        with engine_errors(f"load {info.file}"):
            path = self.bundle.file(info.file)
            session = import_onnxruntime().InferenceSession(path, options, providers=[(CUDA, provider)])
        check_names(session, info)
        return session

    def _on_gpu(self, file: str) -> dict[str, Any]:
        """A weight file's tensors on the GPU, uploaded once and kept for every session that asks."""
        weights = self._sessions.weights
        if file not in weights:
            weights[file] = self._upload(self.bundle.file(file))
        return weights[file]

    def _upload(self, path: Path) -> dict[str, Any]:
        content = np.memmap(path, mode="r")
        entries = [entry for entry in self._entries(content, path) if entry[0] not in self._replaced]
        starts = np.cumsum([0, *(-(-nbytes // ALIGNMENT) * ALIGNMENT for *_, nbytes in entries)]).tolist()
        memory = DeviceMemory(self.gpu, starts[-1])
        values = {}
        for start, (name, dtype, shape, offset, nbytes) in zip(starts, entries, strict=False):
            self.gpu.copy(memory.address + start, content.ctypes.data + offset, nbytes)
            with engine_errors(f"share {path.name}"):
                # ONNX Runtime takes memory of others only, and not its own, as a session's initializers
                view = memory.view(start, shape, np.dtype(STORED_TYPES[dtype]))
                values[name] = import_onnxruntime().OrtValue.from_dlpack(BFloat16(view) if dtype == "BF16" else view)
        self.gpu.synchronize()  # the mapping may go
        return values


class CudaFloat8Backend(CudaBackend):
    """The same with the levels' large products in FP8. Without FP8 on this machine the other twins run, with a warning.

    Raises also `BackendError` for a bundle without FP8 twins.
    """

    name = FLOAT8
    twins = FLOAT8

    def __init__(self, bundle: Bundle):
        require_twins(bundle, FLOAT8)
        super().__init__(bundle)

    def _choose_twins(self) -> None:
        why_not = kernels.why_no_float8(self.gpu.capability) if self._kernels else "its kernels are not loaded"
        if why_not:
            log.warning("no FP8 here, and the levels run as on --backend cuda: %s", why_not)
            self.twins = CudaBackend.twins


def find_cudnn() -> tuple[int, ...] | None:
    """The version of the cuDNN that ONNX Runtime finds, as in (9, 13, 0); None where it finds none of version 9."""
    try:
        number = int(ctypes.CDLL(CUDNN).cudnnGetVersion())  # 91300
    except (OSError, AttributeError):
        return None
    return number // 10_000, number // 100 % 100, number % 100


def attention_kernel(dtype: Dtype, capability: str, cudnn: tuple[int, ...] | None, *, twin: bool) -> str:
    """The kernel that a level's attention is expected to take, by ONNX Runtime 1.31's rules (docs/tensorrt.md).

    ``capability`` is the GPU's, as in ``"9.0"``.
    """
    generation = int(capability.partition(".")[0])
    if dtype == "fp32" or generation < 8:
        return "memory-efficient"
    if twin and generation >= 9 and cudnn is not None and cudnn >= CUDNN_ATTENTION:
        return "cuDNN"
    return "Flash-2"


def safetensors_entries(content: NDArray[np.uint8]) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    """Name, type, shape, offset in the file and bytes of every tensor of a safetensors file.

    The safetensors package gives NumPy arrays only, and NumPy has no bfloat16.
    """
    size = int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8 : 8 + size].tobytes())
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            numbers = prod(entry["shape"]) * np.dtype(STORED_TYPES[entry["dtype"]]).itemsize
            if not 0 <= begin <= end <= len(content) - 8 - size or numbers != end - begin:
                raise ValueError(f"{name} lies outside the file")
            yield name, entry["dtype"], tuple(entry["shape"]), 8 + size + begin, end - begin
