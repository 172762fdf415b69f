"""CUDA through NVIDIA's cuda-python: memory, one stream, replayed graphs. Nothing else in ddit talks to the driver.

Everything is queued on the stream of a `Gpu`, in order. Only what gives values back to the host waits for it.
"""

import ctypes
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ddit.runtime.errors import BackendError

INSTALL = "pip install 'ddit[tensorrt]' or pip install 'ddit[cuda]'"


def why_no_gpu() -> str | None:
    """Why this process cannot use a GPU, in a few words; None if it can.

    The driver is asked, because TensorRT's runtime crashes the whole process on a machine without one.
    """
    try:
        from cuda.bindings import driver
    except ImportError:
        return f"cuda-python is not installed: {INSTALL}"
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError:  # the driver's library is not there
        return "no NVIDIA driver is installed"
    if status != driver.CUresult.CUDA_SUCCESS:
        return f"the NVIDIA driver answers {status.name}"
    status, count = driver.cuDeviceGetCount()
    if status != driver.CUresult.CUDA_SUCCESS or not count:
        return "the NVIDIA driver shows no GPU"
    return None


def driver_version() -> str:
    """The newest CUDA that the driver knows, as in ``"13.0"``. Call it where `why_no_gpu` gives None."""
    from cuda.bindings import driver

    _, number = driver.cuDriverGetVersion()
    return f"{number // 1000}.{number % 1000 // 10}"


def call(function: Any, *args: Any) -> Any:
    """Call a function of the CUDA runtime and unpack its result. Raises `BackendError` for what it reports."""
    from cuda.bindings import runtime

    status, *values = function(*args)
    if status != runtime.cudaError_t.cudaSuccess:
        what = "GPU memory is full" if status == runtime.cudaError_t.cudaErrorMemoryAllocation else status.name
        raise BackendError(f"CUDA could not run {function.__name__}: {what}")
    return values[0] if len(values) == 1 else tuple(values)


class Gpu:
    """The first GPU that this process sees (choose with ``CUDA_VISIBLE_DEVICES``) and a stream on it.

    Raises `BackendError` where there is none.
    """

    def __init__(self) -> None:
        if reason := why_no_gpu():
            raise BackendError(f"no GPU can be used here: {reason}; use --backend cpu")
        from cuda.bindings import runtime

        self._cuda = runtime
        self.stream_owner = Stream(runtime)
        self.stream = self.stream_owner.handle
        properties = call(runtime.cudaGetDeviceProperties, 0)
        self.name: str = properties.name.decode()
        self.capability = f"{properties.major}.{properties.minor}"

    def free_bytes(self) -> int:
        """Bytes of memory that nobody uses."""
        free, _ = call(self._cuda.cudaMemGetInfo)
        return int(free)

    def array(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> "DeviceArray":
        """Memory for an array; what it holds is not defined."""
        return DeviceArray(self, shape, np.dtype(dtype))

    def upload(self, values: NDArray[Any]) -> "DeviceArray":
        """A copy of an array of the host."""
        array = self.array(values.shape, values.dtype)
        array.fill(values)
        return array

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Queue a copy between two addresses, each of the GPU or of the host."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDefault
        call(self._cuda.cudaMemcpyAsync, target, source, nbytes, kind, self.stream)

    def synchronize(self) -> None:
        """Wait until everything that was queued is done."""
        call(self._cuda.cudaStreamSynchronize, self.stream)

    @contextmanager
    def capture(self) -> Iterator["CudaGraph"]:
        """Record what is queued inside the block instead of running it; the graph can be launched afterwards."""
        cuda = self._cuda
        graph = CudaGraph(self)
        # thread-local: other threads may go on allocating memory
        call(cuda.cudaStreamBeginCapture, self.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            yield graph
        except BaseException:
            cuda.cudaStreamEndCapture(self.stream)  # reports the same failure once more
            raise
        graph.instantiate(call(cuda.cudaStreamEndCapture, self.stream))


class Stream:
    """A CUDA stream. Whoever has objects that wait for it at their end holds it until then."""

    def __init__(self, cuda: Any):
        # kernels of the default stream, another library's, for instance, must not hold up this one's
        stream = call(cuda.cudaStreamCreateWithFlags, cuda.cudaStreamNonBlocking)
        self.handle = int(stream)
        self._cuda = cuda
        _release_with(self, cuda.cudaStreamDestroy, stream)

    def drain(self) -> None:
        """Wait until everything that was queued is done, whether well or not: something that it uses will go."""
        self._cuda.cudaStreamSynchronize(self.handle)


class CudaGraph:
    """Queued work that was captured once and is launched as a whole, at the cost of one launch."""

    def __init__(self, gpu: Gpu):
        self._gpu = gpu
        self._executable: Any = None

    def instantiate(self, captured: Any) -> None:
        """Make the captured graph ready to launch."""
        cuda = self._gpu._cuda
        self._executable = call(cuda.cudaGraphInstantiate, captured, 0)
        call(cuda.cudaGraphDestroy, captured)
        _release_with(self, cuda.cudaGraphExecDestroy, self._executable)

    def launch(self) -> None:
        """Queue the work again, on the same addresses."""
        call(self._gpu._cuda.cudaGraphLaunch, self._executable, self._gpu.stream)


class DeviceMemory:
    """Bytes on the GPU, freed with this object."""

    def __init__(self, gpu: Gpu, nbytes: int):
        self.nbytes = nbytes
        self._cuda = cuda = gpu._cuda
        # an allocation of zero bytes is an error, an array without elements is not
        self.address = int(call(cuda.cudaMalloc, max(nbytes, 1)))
        _release_with(self, cuda.cudaFree, self.address)

    @cached_property
    def host(self) -> NDArray[np.uint8]:
        """Page-locked memory of the same size: a copy from there or to there needs no staging and can be captured."""
        address = int(call(self._cuda.cudaHostAlloc, max(self.nbytes, 1), 0))
        # the view keeps the buffer alive, and the memory is freed with the buffer
        buffer = (ctypes.c_char * self.nbytes).from_address(address)
        _release_with(buffer, self._cuda.cudaFreeHost, address)
        return np.frombuffer(memoryview(buffer), dtype=np.uint8)

    def view(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """A part of it as an array that other libraries take over through DLPack, without a copy; keeps it alive."""
        from cuda.core import Buffer
        from cuda.core.utils import StridedMemoryView

        buffer = Buffer.from_handle(self.address + offset, prod(shape) * dtype.itemsize, owner=self)
        return StridedMemoryView.from_buffer(buffer, shape, dtype=dtype)


class BFloat16:
    """An array of 16-bit integers, handed on through DLPack as the bfloat16 numbers whose bits they are.

    NumPy has no such type, and so cuda.core (1.2) refuses to export it.
    """

    # where DLManagedTensor has the code of its type: after a pointer, the device's two integers and the rank
    # (https://dmlc.github.io/dlpack/latest/c_api.html)
    CODE_OFFSET, CODE = 20, 4

    def __init__(self, bits: Any):
        self._bits = bits

    def __dlpack__(self, **options: Any) -> Any:
        """The integers' capsule, with another type in it."""
        capsule = self._bits.__dlpack__(**options)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.argtypes, pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p
        ctypes.c_uint8.from_address(pointer(capsule, b"dltensor") + self.CODE_OFFSET).value = self.CODE
        return capsule

    def __dlpack_device__(self) -> Any:
        """The integers' device."""
        return self._bits.__dlpack_device__()


ALIGNMENT = 256  # bytes, as cudaMalloc aligns: kernels read several numbers at once


class DeviceSpan:
    """Bytes of an allocation that are copied as one."""

    def __init__(self, gpu: Gpu, memory: DeviceMemory, start: int, nbytes: int):
        self.gpu = gpu
        self.nbytes = nbytes
        self.address = memory.address + start
        self._memory, self._start = memory, start

    @property
    def host(self) -> NDArray[np.uint8]:
        """The same bytes in page-locked memory."""
        return self._memory.host[self._start : self._start + self.nbytes]

    def send(self) -> None:
        """Queue a copy of what was staged on the host."""
        self.gpu.copy(self.address, self.host.ctypes.data, self.nbytes)

    def fetch(self) -> None:
        """Queue a copy to the host; `DeviceArray.fetched` gives the values after a `Gpu.synchronize`."""
        self.gpu.copy(self.host.ctypes.data, self.address, self.nbytes)

    def copy_from(self, source: "DeviceSpan") -> None:
        """Queue a copy of a span of the same size."""
        self.gpu.copy(self.address, source.address, self.nbytes)


class DeviceBlock(DeviceSpan):
    """Arrays side by side in one allocation."""

    def __init__(self, gpu: Gpu, shapes: Mapping[str, tuple[int, ...]]):
        """``shapes`` of float32 arrays, by name."""
        dtype = np.dtype(np.float32)
        sizes = [-(-prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT for shape in shapes.values()]
        starts = np.cumsum([0, *sizes]).tolist()
        memory = DeviceMemory(gpu, starts[-1])
        super().__init__(gpu, memory, 0, starts[-1])
        self.arrays = {
            name: DeviceArray(gpu, shape, dtype, memory, start)
            for (name, shape), start in zip(shapes.items(), starts, strict=False)
        }


class DeviceArray(DeviceSpan):
    """An array on the GPU, in C order."""

    def __init__(
        self, gpu: Gpu, shape: tuple[int, ...], dtype: np.dtype[Any], memory: DeviceMemory | None = None, start: int = 0
    ):
        """``memory``: an allocation to lie in, from byte ``start`` on; one of its own when None."""
        nbytes = prod(shape) * dtype.itemsize
        super().__init__(gpu, memory or DeviceMemory(gpu, nbytes), start, nbytes)
        self.shape = shape
        self.dtype = dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry along the first axis."""
        return self.nbytes // self.shape[0]

    @cached_property
    def _host(self) -> NDArray[Any]:
        """The page-locked memory as an array."""
        return self.host.view(self.dtype).reshape(self.shape)

    def fill(self, values: NDArray[Any]) -> None:
        """Copy an array of the host here, converted to this dtype; shapes must agree. Waits for what is queued."""
        self.gpu.synchronize()  # an earlier copy may still read the page-locked memory
        self.stage(values)
        self.send()

    def stage(self, values: NDArray[Any]) -> None:
        """Put values where the next `send` takes them from. Nothing that is queued may still read there."""
        if values.shape != self.shape:
            raise ValueError(f"an array of shape {values.shape} does not fit into {self.shape}")
        self._host[...] = values

    def fill_row(self, row: int, values: NDArray[Any]) -> None:
        """Copy an array of the host to one entry along the first axis. Waits for what is queued."""
        if values.shape != self.shape[1:]:
            raise ValueError(f"an array of shape {values.shape} does not fit into a row of {self.shape}")
        self.gpu.synchronize()  # an earlier copy may still read the page-locked memory
        self._host[row] = values
        self.gpu.copy(self.address + row * self.row_bytes, self._host[row : row + 1].ctypes.data, self.row_bytes)

    def copy_rows(self, row: int, source: "DeviceArray", source_row: int, count: int) -> None:
        """Queue a copy of entries along the first axis, ``count`` in a row."""
        self.gpu.copy(
            self.address + row * self.row_bytes, source.address + source_row * source.row_bytes, count * self.row_bytes
        )

    def download_row(self, row: int) -> NDArray[Any]:
        """The values of one entry along the first axis. Waits for everything that was queued."""
        host = self._host[row : row + 1]
        self.gpu.copy(host.ctypes.data, self.address + row * self.row_bytes, self.row_bytes)
        self.gpu.synchronize()
        return host[0].copy()  # type: ignore[no-any-return]

    def fetched(self) -> NDArray[Any]:
        """What the last `fetch` brought."""
        return self._host.copy()


def _release_with(owner: Any, free: Any, handle: Any) -> None:
    """Free a resource together with its owner, but not at the end of the process: the driver frees everything then."""
    weakref.finalize(owner, free, handle).atexit = False
