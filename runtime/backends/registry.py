"""The backends by name: what each can do, and how it is opened.

A new backend is a `Backend` and a `BackendKind` that `register` is told of, or that another package names as an entry
point of the group ``ddit.backends``. Names that nobody registered are those of ONNX Runtime's execution providers.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Literal

from ddit.runtime.backends.base import Backend
from ddit.runtime.backends.device.cuda import why_no_gpu
from ddit.runtime.bundle import Bundle
from ddit.runtime.errors import DditError, UsageError

if TYPE_CHECKING:
    from ddit.runtime.backends.building import EngineBuilder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BackendKind:
    """A backend as data. Whatever is heavy is imported by ``open`` and ``builder`` when they are called."""

    name: str
    description: str  # one line
    # of a bundle, with so many threads (None: all cores); raises `DditError` where this machine cannot run it
    open: Callable[[Bundle, int | None], Backend]
    device: Literal["host", "gpu"] = "host"
    exact_float32: bool = False  # float32 graphs are computed in float32, not in TF32 or less
    float8: bool = False  # the levels' large products are computed in FP8
    rank: int | None = None  # in the automatic choice, lowest first; None: only when asked for
    # For a backend whose engines must be built beforehand, its `EngineBuilder`: called with a `Report`, a `Progress`
    # and, by name, those of ``build_options`` that were given. Raises `BackendError` where it cannot build here.
    builder: "Callable[..., EngineBuilder] | None" = None
    build_options: tuple[str, ...] = ()  # options of ddit-export engines that the builder takes

    @property
    def needs_build(self) -> bool:
        """Whether engines must be built beforehand."""
        return self.builder is not None


def _open_tensorrt(bundle: Bundle, threads: int | None) -> Backend:
    from ddit.runtime.backends.tensorrt.backend import TensorRTBackend

    return TensorRTBackend(bundle)


def _tensorrt_builder(*args: object, **options: object) -> "EngineBuilder":
    from ddit.runtime.backends.tensorrt.builder import TensorRTBuilder

    return TensorRTBuilder(*args, **options)  # type: ignore[arg-type]


def _open_tensorrt_rtx(bundle: Bundle, threads: int | None) -> Backend:
    from ddit.runtime.backends.tensorrt.rtx import TensorRTRTXBackend

    return TensorRTRTXBackend(bundle)


def _tensorrt_rtx_builder(*args: object, **options: object) -> "EngineBuilder":
    from ddit.runtime.backends.tensorrt.rtx import TensorRTRTXBuilder

    return TensorRTRTXBuilder(*args, **options)  # type: ignore[arg-type]


def _open_cuda(bundle: Bundle, threads: int | None) -> Backend:
    from ddit.runtime.backends.onnxruntime.cuda import CudaBackend

    return CudaBackend(bundle)


def _open_cuda_float8(bundle: Bundle, threads: int | None) -> Backend:
    from ddit.runtime.backends.onnxruntime.cuda import CudaFloat8Backend

    return CudaFloat8Backend(bundle)


def _open_cpu_float8(bundle: Bundle, threads: int | None) -> Backend:
    from ddit.runtime.backends.onnxruntime.host import CpuFloat8Backend

    return CpuFloat8Backend(bundle, threads)


def _open_onnxruntime(name: str, bundle: Bundle, threads: int | None) -> Backend:
    from ddit.runtime.backends.onnxruntime.host import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, name, threads)


_kinds: dict[str, BackendKind] = {}


def register(kind: BackendKind) -> None:
    """Make a backend known by its name. Raises `ValueError` for a name that is taken."""
    if kind.name in _kinds:
        raise ValueError(f"there is a backend {kind.name!r} already")
    _kinds[kind.name] = kind


register(
    BackendKind(
        name="tensorrt",
        description="TensorRT engines, built on the machine that runs them",
        open=_open_tensorrt,
        device="gpu",
        rank=10,
        builder=_tensorrt_builder,
        build_options=("timing_cache", "optimization_level", "workspace"),
    )
)
register(
    BackendKind(
        name="tensorrt-rtx",
        description="TensorRT-RTX engines for RTX cards, built on any machine; only when asked for",
        open=_open_tensorrt_rtx,
        device="gpu",
        builder=_tensorrt_rtx_builder,
        build_options=("target",),
    )
)
register(
    BackendKind(
        name="cuda",
        description="ONNX Runtime's CUDA provider, on buffers of the GPU",
        open=_open_cuda,
        device="gpu",
        rank=20,
    )
)
register(
    BackendKind(
        name="cuda-fp8",
        description="cuda with the levels' products in FP8, after ddit-export fp8; only when asked for",
        open=_open_cuda_float8,
        device="gpu",
        float8=True,
    )
)
register(
    BackendKind(
        name="cpu-fp8",
        description="what cuda-fp8 computes, on the CPU, to look at its pictures; only when asked for",
        open=_open_cpu_float8,
        float8=True,
    )
)
register(
    BackendKind(
        name="cpu",
        description="ONNX Runtime on the CPU",
        open=lambda bundle, threads: _open_onnxruntime("cpu", bundle, threads),
        exact_float32=True,
        rank=100,
    )
)


@cache
def _load_plugins() -> None:
    """Register the backends of other packages. One that cannot be imported is left out, with a warning."""
    for point in entry_points(group="ddit.backends"):
        try:
            register(point.load())
        except Exception as error:  # whatever another package raises
            log.warning("the backend %s of %s cannot be loaded: %s", point.name, point.value, error)


def kinds() -> list[BackendKind]:
    """Every registered backend, in the order of the automatic choice; those that it leaves out come last."""
    _load_plugins()
    return sorted(_kinds.values(), key=lambda kind: (kind.rank is None, kind.rank or 0, kind.name))


def kind_of(name: str) -> BackendKind:
    """The backend of a name. One that nobody registered is an execution provider of ONNX Runtime."""
    _load_plugins()
    return _kinds.get(name) or BackendKind(
        name=name,
        description=f"ONNX Runtime's {name}, on arrays of the host",
        open=lambda bundle, threads: _open_onnxruntime(name, bundle, threads),
    )


def open_backend(name: str | None, bundle: Bundle, threads: int | None = None, *, low_memory: bool = False) -> Backend:
    """A backend by name, or the fastest that this machine can run when None.

    ``low_memory``: text encoders and levels take turns in memory, whether there is enough for both or not.
    Raises `BackendError` where this machine cannot run the one asked for, `UsageError` where nobody knows the name.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"the number of threads must be at least 1, not {threads}")
    if threads is not None and threads > (cores := os.cpu_count() or 1):
        log.warning("%d threads are more than this machine's %d cores: %d are used", threads, cores, cores)
        threads = cores
    opened = _open_fastest(bundle, threads) if name is None else kind_of(name).open(bundle, threads)
    opened.low_memory |= low_memory
    return opened


def _open_fastest(bundle: Bundle, threads: int | None) -> Backend:
    """The first of `kinds` that opens; the log says why those before it did not."""
    no_gpu = why_no_gpu()
    if no_gpu:
        log.info("no GPU: %s", no_gpu)
    usable = [kind for kind in kinds() if kind.rank is not None and not (no_gpu and kind.device == "gpu")]
    for kind in usable[:-1]:
        try:
            return kind.open(bundle, threads)
        except DditError as error:
            log.warning("not %s: %s", kind.name, error)
    return usable[-1].open(bundle, threads)
