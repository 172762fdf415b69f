"""cuda-python without a GPU: device memory is host memory, and a stream runs its work when somebody waits for it.

Stricter than a GPU: every copy must lie inside one allocation, and reading a result without waiting gives old values.
"""

import ctypes
import sys
from collections.abc import Callable
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np


class Status(Enum):
    cudaSuccess = 0  # noqa: N815, the names are CUDA's
    cudaErrorMemoryAllocation = 2  # noqa: N815
    cudaErrorStreamCaptureInvalidated = 901  # noqa: N815


class DriverStatus(Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_NO_DEVICE = 100


class FakeCuda:
    """One GPU. ``cuda.bindings`` is it while `install` is in effect."""

    def __init__(self, name: str = "Fake GPU", total: int = 10**9):
        self.name = name
        self.total = total
        self.devices = 1
        self.memory: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.pinned: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.freed: dict[int, ctypes.Array[ctypes.c_char]] = {}  # kept, so that a use afterwards is seen
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.launches = 0
        self.synchronizations = 0
        self.events: list[str] = []

    def install(self, monkeypatch) -> "FakeCuda":
        """Put this GPU in the place of cuda-python."""
        package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
        bindings.runtime, bindings.driver = self.runtime(), self.driver()
        package.bindings = bindings
        core, utils = ModuleType("cuda.core"), ModuleType("cuda.core.utils")
        core.Buffer = SimpleNamespace(from_handle=self.buffer)
        utils.StridedMemoryView = SimpleNamespace(from_buffer=self.strided_view)
        for module in (package, bindings, bindings.runtime, bindings.driver, core, utils):
            module.__spec__ = ModuleSpec(module.__name__, None, origin=__file__)  # torch asks for it
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return self

    @property
    def used(self) -> int:
        """Bytes of device memory that are allocated."""
        return sum(map(len, self.memory.values()))

    def submit(self, work: Callable[[], None]) -> None:
        """Queue work, or record it while a graph is captured."""
        (self.queue if self.captured is None else self.captured).append(work)

    def flush(self) -> None:
        """Run what was queued."""
        self.queue, work = [], self.queue
        for one in work:
            one()

    def check(self, address: int, nbytes: int) -> None:
        """See that a range lies inside an allocation."""
        for blocks in (self.memory, self.pinned, self.freed):
            for start, block in blocks.items():
                if start <= address < start + len(block):
                    assert blocks is not self.freed, "memory is used that was freed"
                    assert address + nbytes <= start + len(block), "a copy leaves its allocation"

    def read(self, address: int, nbytes: int) -> bytes:
        """Bytes of the memory."""
        self.check(address, nbytes)
        return ctypes.string_at(address, nbytes)

    def write(self, address: int, content: bytes) -> None:
        """Set bytes of the memory."""
        self.check(address, len(content))
        ctypes.memmove(address, content, len(content))

    def buffer(self, address: int, nbytes: int, owner: object) -> "ctypes.Array[ctypes.c_char]":
        """``cuda.core.Buffer.from_handle``."""
        self.check(address, nbytes)
        block = (ctypes.c_char * nbytes).from_address(address)
        block.owner = owner
        return block

    @staticmethod
    def strided_view(buffer, shape, dtype) -> np.ndarray:
        """``cuda.core.utils.StridedMemoryView.from_buffer``: something with ``__dlpack__``."""
        return np.frombuffer(buffer, dtype=dtype).reshape(shape)

    def driver(self) -> ModuleType:
        """``cuda.bindings.driver``."""
        module = ModuleType("cuda.bindings.driver")
        module.CUresult = DriverStatus
        answer = DriverStatus.CUDA_SUCCESS if self.devices else DriverStatus.CUDA_ERROR_NO_DEVICE
        module.cuInit = lambda flags: (answer,)
        module.cuDriverGetVersion = lambda: (DriverStatus.CUDA_SUCCESS, 13000)
        module.cuDeviceGetCount = lambda: (DriverStatus.CUDA_SUCCESS, self.devices)
        return module

    def runtime(self) -> ModuleType:
        """``cuda.bindings.runtime``."""
        module = ModuleType("cuda.bindings.runtime")
        module.cudaError_t = Status
        module.cudaStreamNonBlocking = 1
        module.cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)
        module.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
        for name in dir(self):
            if name.startswith("cuda"):
                setattr(module, name, getattr(self, name))
        return module

    # ---- the functions, by CUDA's names ----

    def cudaGetDeviceProperties(self, device):  # noqa: N802
        return Status.cudaSuccess, SimpleNamespace(name=self.name.encode(), major=9, minor=0)

    def cudaMemGetInfo(self):  # noqa: N802
        return Status.cudaSuccess, self.total - self.used, self.total

    def cudaMalloc(self, nbytes):  # noqa: N802
        if self.captured is not None:
            return Status.cudaErrorStreamCaptureInvalidated, 0
        if self.used + nbytes > self.total:
            return Status.cudaErrorMemoryAllocation, 0
        return Status.cudaSuccess, self._allocate(self.memory, nbytes)

    def cudaFree(self, address):  # noqa: N802
        self.flush()  # as the real one waits
        self.freed[address] = self.memory.pop(address)
        return (Status.cudaSuccess,)

    def cudaHostAlloc(self, nbytes, flags):  # noqa: N802
        return Status.cudaSuccess, self._allocate(self.pinned, nbytes)

    def cudaFreeHost(self, address):  # noqa: N802
        self.flush()
        self.freed[address] = self.pinned.pop(address)
        return (Status.cudaSuccess,)

    @staticmethod
    def _allocate(memory, nbytes):
        block = ctypes.create_string_buffer(b"\xff" * nbytes, nbytes)  # not zeros: fresh memory holds anything
        memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def cudaMemcpyAsync(self, target, source, nbytes, kind, stream):  # noqa: N802
        self.submit(lambda: self.write(target, self.read(source, nbytes)))
        return (Status.cudaSuccess,)

    def cudaMemsetAsync(self, address, value, nbytes, stream):  # noqa: N802
        self.submit(lambda: self.write(address, bytes([value]) * nbytes))
        return (Status.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags):  # noqa: N802
        return Status.cudaSuccess, 77

    def cudaStreamDestroy(self, stream):  # noqa: N802
        self.events.append("the stream was destroyed")
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):  # noqa: N802
        if self.captured is not None:
            return (Status.cudaErrorStreamCaptureInvalidated,)
        self.synchronizations += 1
        self.flush()
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream, mode):  # noqa: N802
        self.captured = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):  # noqa: N802
        graph, self.captured = self.captured, None
        return Status.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph, flags):  # noqa: N802
        return Status.cudaSuccess, graph

    def cudaGraphDestroy(self, graph):  # noqa: N802
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph):  # noqa: N802
        return (Status.cudaSuccess,)

    def cudaGraphLaunch(self, graph, stream):  # noqa: N802
        self.launches += 1
        self.queue += graph
        return (Status.cudaSuccess,)
