"""TensorRT-RTX: NVIDIA's TensorRT for GeForce and RTX cards, whose builder needs no GPU.

Its Python module is TensorRT 11's under another name, so that the engine of a graph is parsed, stored and run as
TensorRT's are. What differs is what an engine is built for: a compute capability that is named, and not the GPU that
happens to be there. Kernels are compiled when an engine first runs, on the machine that runs it.
"""

import ctypes
import importlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ddit.profiles import Profile
from ddit.runtime.backends.artifacts import Target
from ddit.runtime.backends.building import EngineBuilder, Progress, Report
from ddit.runtime.backends.device.cuda import Gpu, why_no_gpu
from ddit.runtime.backends.tensorrt import compat
from ddit.runtime.backends.tensorrt.backend import TensorRTBackend
from ddit.runtime.backends.tensorrt.builder import parse, profile_sizes
from ddit.runtime.bundle import Bundle
from ddit.runtime.errors import BackendError, UsageError

NAME = "tensorrt-rtx"
# The package index has the libraries in ONNX Runtime's plug-in and the bindings on their own; NVIDIA's own download has
# all of it in one module.
WHOLE, BINDINGS, LIBRARIES = "tensorrt_rtx", "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"
LOADED_BY_BINDINGS = ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*")


def import_tensorrt_rtx() -> Any:
    """TensorRT-RTX's Python module, or a `BackendError` that says how to install it."""
    if find_spec(WHOLE):
        return importlib.import_module(WHOLE)
    libraries = find_spec(LIBRARIES)
    if libraries is None or not libraries.submodule_search_locations or find_spec(BINDINGS) is None:
        raise BackendError("TensorRT-RTX is not installed; run: pip install 'ddit[tensorrt-rtx]'")
    (folder,) = libraries.submodule_search_locations
    try:
        for pattern in LOADED_BY_BINDINGS:
            for file in sorted(Path(folder).glob(pattern)):
                # the bindings ask for these by their short names, which no file has: one that is loaded will do
                ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
        return importlib.import_module(BINDINGS)
    except (ImportError, OSError) as error:
        raise BackendError(f"TensorRT-RTX cannot be loaded: {error}; pip install 'ddit[tensorrt-rtx]' anew") from None


def capabilities(trt: Any) -> list[str]:
    """What engines can be built for, as in ``sm89``: by the library's own list."""
    names = (name.lower() for name in dir(trt.ComputeCapability) if name.startswith("SM"))
    return sorted(names, key=lambda name: int(name[2:]))


def rtx_target(trt: Any, capability: str) -> Target:
    """What an engine for a compute capability, as in ``sm89``, needs to run."""
    version = trt.__version__
    return Target(
        backend=NAME,
        title="TensorRT-RTX",
        needs={"tensorrt_rtx": version, "compute_capability": capability},
        words=f"{capability}, TensorRT-RTX {version}",
    )


def this_capability(gpu: Gpu) -> str:
    """A GPU's compute capability: ``"8.9"`` → ``"sm89"``."""
    return "sm" + gpu.capability.replace(".", "")


class TensorRTRTXBuilder(EngineBuilder):
    """Builds for one compute capability, on any machine. Raises `BackendError` without TensorRT-RTX.

    Args:
        target: as in ``sm89``; that of this machine's GPU when None.
    """

    file = "engine.plan"

    def __init__(self, report: Report, progress: Progress, *, target: str | None = None):
        self.trt = import_tensorrt_rtx()
        try:
            import onnx_ir  # noqa: F401
        except ImportError:
            raise BackendError(
                "building engines needs onnx_ir; install it with: pip install 'ddit[tensorrt-rtx]'"
            ) from None
        known = capabilities(self.trt)
        if target is None:
            if reason := why_no_gpu():
                raise UsageError(
                    f"no GPU tells here what to build for ({reason}); name it: --target {' or '.join(known)}"
                )
            target = this_capability(Gpu())
        if target not in known:
            raise UsageError(
                f"TensorRT-RTX {self.trt.__version__} builds nothing for {target}; it knows {', '.join(known)}"
            )
        super().__init__(rtx_target(self.trt, target), {}, report, progress)

    def _build(self, bundle: Bundle, profile: Profile, graph: str, temporary: str) -> tuple[memoryview, int]:
        """A plan. How much scratch memory it needs is known where it is loaded, which takes a GPU."""
        trt = self.trt
        logger, builder, network, _parser = parse(trt, bundle, graph, temporary)
        with self.progress(graph) as report:
            monitor = compat.progress_monitor(trt, report)
            config = builder.create_builder_config()
            config.progress_monitor = monitor
            config.num_compute_capabilities = 1
            config.set_compute_capability(
                getattr(trt.ComputeCapability, self.target.needs["compute_capability"].upper()), 0
            )
            for sizes in profile_sizes(bundle.manifest, bundle.graph(graph), profile):
                shapes = builder.create_optimization_profile()
                for name, bounds in sizes.items():
                    shapes.set_shape(name, *bounds)
                config.add_optimization_profile(shapes)
            serialized = builder.build_serialized_network(network, config)
        if monitor is not None and monitor.interrupted:
            raise KeyboardInterrupt
        if serialized is None:
            said = " ".join(logger.errors) or "no reason given"
            raise BackendError(f"TensorRT-RTX could not build {graph}: {said.splitlines()[0]}")
        return memoryview(serialized), 0


class TensorRTRTXBackend(TensorRTBackend):
    """`TensorRTBackend` on TensorRT-RTX and its engines. Nobody has run it on an RTX card yet."""

    name = NAME

    def _library(self) -> Any:
        return import_tensorrt_rtx()

    def _target(self) -> Target:
        return rtx_target(self.trt, this_capability(self.gpu))
