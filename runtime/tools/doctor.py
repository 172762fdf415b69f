"""What a machine has of what backends need, and what a bundle's levels become on it."""

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from ddit.runtime.backends.artifacts import EngineStore
from ddit.runtime.backends.device.cuda import Gpu, driver_version, why_no_gpu
from ddit.runtime.backends.onnxruntime import cuda, kernels
from ddit.runtime.backends.onnxruntime.cuda import CudaBackend
from ddit.runtime.backends.onnxruntime.host import import_onnxruntime
from ddit.runtime.backends.registry import kinds
from ddit.runtime.bundle import Bundle
from ddit.runtime.errors import BackendError, DditError

LIBRARIES = (
    *("ddit", "numpy", "onnxruntime", "onnxruntime-gpu", "cuda-python", "nvidia-cudnn-cu13", "tensorrt"),
    "tensorrt-rtx-cu13-bindings",
)
GENERATIONS = {"Turing": "7.5", "Ampere": "8.6", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "12.0"}


@dataclass(frozen=True)
class GpuState:
    """The GPU that backends would use."""

    name: str
    capability: str  # as in "9.0"
    free_bytes: int
    driver: str  # the newest CUDA that it knows


@dataclass(frozen=True)
class Machine:
    """What is here, whatever the bundle."""

    python: str
    system: str
    gpu: GpuState | None
    no_gpu: str | None  # why there is none
    libraries: dict[str, str]  # versions of those that are installed
    providers: tuple[str, ...]  # ONNX Runtime's execution providers; empty without ONNX Runtime
    cudnn: str | None  # the version that ONNX Runtime finds
    kernels: bool  # whether ddit was installed with its own for CUDA
    no_float8: str | None  # why these have no products in FP8 on the GPU, None where they have


@dataclass(frozen=True)
class BackendState:
    """Whether a backend can open a bundle here."""

    name: str
    ready: bool
    says: str


@dataclass(frozen=True)
class LevelState:
    """What a level becomes on the cuda backend."""

    graph: str
    file: str
    attention: dict[str, str]  # the kernel to expect, by GPU: this one, or by generation where there is none
    on_cpu: list[str] | None  # nodes that run on the CPU; None where no session can be opened


def look_at_machine() -> Machine:
    """Ask the driver, the packages and ONNX Runtime."""
    gpu, reason = None, why_no_gpu()
    if reason is None:
        found = Gpu()
        gpu = GpuState(found.name, found.capability, found.free_bytes(), driver_version())
    try:
        ort = import_onnxruntime()
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # what the cuda backend does before it looks for cuDNN
        providers = tuple(ort.get_available_providers())
    except BackendError:
        providers = ()
    cudnn = cuda.find_cudnn()
    return Machine(
        python=platform.python_version(),
        system=platform.platform(),
        gpu=gpu,
        no_gpu=reason,
        libraries={name: its for name in LIBRARIES if (its := _version(name))},
        providers=providers,
        cudnn=".".join(map(str, cudnn)) if cudnn else None,
        kernels=kernels.find_library() is not None,
        no_float8=_why_no_float8(gpu.capability) if gpu else "there is no GPU",
    )


def _why_no_float8(capability: str) -> str | None:
    return kernels.why_no_float8(capability) if kernels.load_kernels(capability) else "its kernels cannot be loaded"


def try_backends(bundle: Bundle) -> Iterator[BackendState]:
    """Open a bundle with every backend; none of them loads its weights for that."""
    for kind in kinds():
        try:
            backend = kind.open(bundle, None)
            yield BackendState(kind.name, True, f"ready: {backend}")
        except DditError as error:
            yield BackendState(kind.name, False, str(error))


def look_at_levels(bundle: Bundle, machine: Machine) -> Iterator[LevelState]:
    """Every level on the cuda backend, opened where that can be done: this loads its weights onto the GPU."""
    manifest = bundle.manifest
    try:
        backend = CudaBackend(bundle) if machine.gpu else None
    except DditError:
        backend = None
    where = {machine.gpu.name: machine.gpu.capability} if machine.gpu else GENERATIONS
    cudnn = cuda.find_cudnn() if machine.gpu else cuda.CUDNN_ATTENTION  # the extra brings it
    for patch in manifest.patches:
        graph = manifest.level(patch).graph
        info = manifest.graphs[graph]
        on_cpu = None
        if backend:
            backend.engine(graph)
            on_cpu = backend.on_cpu(graph)
        attention = {
            name: cuda.attention_kernel(info.dtype, capability, cudnn, twin=CudaBackend.name in info.twins)
            for name, capability in where.items()
        }
        yield LevelState(graph, info.on(CudaBackend.name).file, attention, on_cpu)


def engines(bundle: Bundle) -> dict[str, int]:
    """How many engines a bundle holds, by what they were built for."""
    built = [one.info.built_for for one in EngineStore(bundle).engines()]
    return {name: built.count(name) for name in sorted(set(built))}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
