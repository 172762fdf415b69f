"""TensorRT: one engine per graph, all on one stream and with one block of scratch memory.

Engines come from the bundle's store (`ddit.runtime.backends.artifacts`); ``ddit-export engines`` builds them. Nothing
runs at the same time, so that the largest engine's scratch memory serves them all.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ddit.runtime import shapes
from ddit.runtime.backends.artifacts import EngineStore, StoredEngine, Target
from ddit.runtime.backends.device.cuda import DeviceArray, DeviceMemory
from ddit.runtime.backends.device.workspace import Bound, DeviceBackend, DeviceEngine
from ddit.runtime.backends.tensorrt import compat
from ddit.runtime.backends.tensorrt.engines import choose, this_target
from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.manifest import GraphInfo, TensorSpec
from ddit.runtime.errors import BackendError

log = logging.getLogger(__name__)

NUMPY_TYPES = {"FLOAT": np.float32, "INT32": np.int32, "INT64": np.int64}


class TensorRTBound(Bound):
    """An execution context whose shapes, addresses and scratch memory are set."""

    def __init__(self, context: Any, stream: int, graph: str):
        self._context = context
        self._stream = stream
        self._graph = graph

    def enqueue(self) -> None:
        """Queue one run."""
        if not self._context.execute_async_v3(self._stream):
            raise BackendError(f"TensorRT could not run {self._graph}; ddit-run -vv shows its messages")


class TensorRTEngine(DeviceEngine):
    """One graph's engines of several profiles, of which those are loaded that hold the sizes asked for."""

    def __init__(self, backend: "TensorRTBackend", info: GraphInfo, stored: Sequence[StoredEngine]):
        super().__init__(backend, info)
        self._trt_backend = backend
        self._stored = list(stored)
        self._loaded: dict[str, Any] = {}

    def dtype(self, spec: TensorSpec) -> DTypeLike:
        """float32, and for token ids what the engine takes: TensorRT before 10 has no int64."""
        engine = next(iter(self._loaded.values()), None) or self._load(self._stored[0])
        return NUMPY_TYPES[engine.get_tensor_dtype(spec.name).name]

    def bind(self, arrays: Mapping[str, DeviceArray], *, replayed: bool) -> Bound:
        """An execution context of its own, so that captured graphs keep what they were captured with."""
        specs, latent = self.info.inputs, self.backend.bundle.manifest.latent
        sizes = shapes.infer((spec.shape for spec in specs), (arrays[spec.name].shape for spec in specs))
        stored, index = choose(self._stored, shapes.to_names(latent, sizes))
        backend, engine, graph = self._trt_backend, self._load(stored), stored.info.graph
        context = compat.create_context(backend.trt, engine)
        scratch = backend.scratch(compat.scratch_bytes(engine))
        compat.set_scratch(context, scratch.address, scratch.nbytes)
        if not context.set_optimization_profile_async(index, backend.gpu.stream):
            raise BackendError(f"TensorRT could not choose profile {index} of {graph}")
        backend.gpu.synchronize()
        for spec in self.info.inputs:
            if not context.set_input_shape(spec.name, arrays[spec.name].shape):
                raise BackendError(f"TensorRT refuses shape {arrays[spec.name].shape} of {graph}.{spec.name}")
        for name, array in arrays.items():
            context.set_tensor_address(name, array.address)
        return TensorRTBound(context, backend.gpu.stream, graph)

    def _load(self, stored: StoredEngine) -> Any:
        key = stored.info.key
        if key not in self._loaded:
            log.info("loading %s: %s, %.0f MB", stored.info.graph, key, stored.info.size / 1e6)
            self._loaded[key] = self._trt_backend.deserialize(stored)
        return self._loaded[key]


class TensorRTBackend(DeviceBackend):
    """One TensorRT runtime. Raises `BackendError` where there is no GPU, no TensorRT, or an engine is missing."""

    name = "tensorrt"
    captures = True

    def __init__(self, bundle: Bundle):
        self.trt = self._library()
        super().__init__(bundle)  # asks the driver first: TensorRT's runtime crashes without a GPU
        self.target = self._target()
        store = EngineStore(bundle)
        self.stored = {graph: store.find(graph, self.target) for graph in bundle.manifest.graphs}
        self._logger = compat.make_logger(self.trt)
        self._runtime = self.trt.Runtime(self._logger)
        self._loaded: set[str] = set()
        self._scratch: list[DeviceMemory] = []

    def _library(self) -> Any:
        return compat.import_tensorrt()

    def _target(self) -> Target:
        """What engines must have been built for to run here."""
        return this_target(self.trt, self.gpu)

    def _open(self, graph: str) -> DeviceEngine:
        return TensorRTEngine(self, self.bundle.graph(graph), self.stored[graph])

    def check(self, sizes: Mapping[str, int], graphs: Collection[str] | None = None) -> None:
        """See that the graphs have whole engines for the sizes, and that those not yet loaded fit into GPU memory.

        Raises `UsageError` and `BackendError`.
        """
        chosen = [choose(self.stored[graph], sizes)[0] for graph in (self.stored if graphs is None else graphs)]
        missing = [one for one in chosen if one.info.key not in self._loaded]
        for one in missing:
            one.check()
        for phase in self.phases() if self.low_memory else (self.bundle.manifest.graphs,):
            self.check_memory([one for one in missing if one.info.graph in phase])

    def release(self) -> None:
        """The scratch memory stays."""
        super().release()
        self._loaded.clear()

    def check_memory(self, stored: Sequence[StoredEngine]) -> None:
        """Raise `BackendError` with needed and free bytes where engines would not fit."""
        held = self._scratch[-1].nbytes if self._scratch else 0
        scratch = max((one.info.scratch for one in stored), default=0)
        needed = sum(one.info.size for one in stored) + max(0, scratch - held)
        if stored and needed > (free := self.gpu.free_bytes()):
            raise BackendError(
                f"GPU memory is too small: the engines need {needed / 1e9:.2f} GB ({scratch / 1e9:.2f} GB of it "
                f"scratch memory), {free / 1e9:.2f} GB of {self.gpu.name} are free; stop other programs, or build "
                f"engines for smaller sizes: {stored[0].build_command} --profile PROFILE"
            )

    def scratch(self, nbytes: int) -> DeviceMemory:
        """The scratch memory of all contexts, at least ``nbytes``.

        A smaller block from before is kept: contexts and captured graphs still point to it.
        """
        if not self._scratch or self._scratch[-1].nbytes < nbytes:
            largest = max(one.info.scratch for stored in self.stored.values() for one in stored)
            self._scratch.append(DeviceMemory(self.gpu, max(nbytes, largest)))
        return self._scratch[-1]

    def deserialize(self, stored: StoredEngine) -> Any:
        """Load an engine."""
        engine = self._runtime.deserialize_cuda_engine(stored.map())
        if engine is None:
            reason = self._logger.errors[-1] if self._logger.errors else "no reason given"
            raise BackendError(f"TensorRT could not load {stored.file}: {reason}; run: {stored.build_command}")
        self._loaded.add(stored.info.key)
        return engine
