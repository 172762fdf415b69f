"""What differs between TensorRT 8.6, 10 and 11. Every difference is found by asking for a feature, never for a version.

The exporter's builder and the runtime's backend go through here; the rest of TensorRT's Python API that they use is the
same in all three.
"""

import logging
from collections.abc import Callable
from typing import Any

from ddit.runtime.errors import BackendError

log = logging.getLogger(__name__)

# Where a release lets the builder choose kernels of other libraries, it may take only those of its own: a plan then
# needs neither cuBLAS nor cuDNN. TensorRT 10 and later do this by themselves.
OWN_TACTICS = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")


def import_tensorrt() -> Any:
    """TensorRT's Python module, or a `BackendError` that says how to install it."""
    try:
        import tensorrt
    except ImportError:
        raise BackendError("TensorRT is not installed; choose the release that fits your driver: "
                           "pip install 'ddit[tensorrt]' (TensorRT 10 or 11)") from None  # fmt: skip
    return tensorrt


def make_logger(trt: Any) -> Any:
    """A TensorRT logger that passes messages on to `logging` and keeps the errors in ``errors``."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            # an error becomes the line that the user sees; here it is a detail
            log.debug("TensorRT: %s", message)

    return Logger()


def strongly_typed(trt: Any) -> bool:
    """Whether networks compute in the graph's own types (TensorRT 10 and later; 11 knows nothing else)."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def network_flags(trt: Any) -> int:
    """Flags for ``Builder.create_network``."""
    flag = trt.NetworkDefinitionCreationFlag
    return 1 << int(flag.STRONGLY_TYPED if strongly_typed(trt) else flag.EXPLICIT_BATCH)


def own_tactic_sources(trt: Any) -> list[Any] | None:
    """The tactic sources to allow, or None for the release's own choice."""
    if not hasattr(trt.TacticSource, "CUBLAS"):
        return None
    return [getattr(trt.TacticSource, name) for name in OWN_TACTICS]


def share_profiles(trt: Any, config: Any) -> None:
    """Let several execution contexts use one optimisation profile: a preview feature of 8.6, later the rule."""
    feature = getattr(trt.PreviewFeature, "PROFILE_SHARING_0806", None)
    if feature is not None:
        config.set_preview_feature(feature, True)


def let_attention_decompose(trt: Any, network: Any) -> None:
    """Allow every attention to fall back on plain layers where no fused kernel fits.

    The parser leaves it forbidden, and the build then fails for sizes without a kernel. Releases before 10.14 have no
    such layer.
    """
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    if kind is None or not hasattr(trt, "IAttentionInputLayer"):
        return
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # the network hands out the base class only
            layer.attention.decomposable = True


def progress_monitor(trt: Any, report: Callable[[str, int, int], None]) -> Any | None:
    """A monitor for the builder configuration, or None where a release has none (8.6).

    ``report`` is told a phase's name, the steps that are done and how many there are; outermost phases only.
    """
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, int] = {}
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.phases[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if phase_name in self.phases:
                    report(phase_name, step + 1, self.phases[phase_name])
            except KeyboardInterrupt:  # an exception cannot pass through the builder; False ends it
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

    return Monitor()


def scratch_bytes(engine: Any) -> int:
    """Bytes of scratch memory that one execution context of the engine needs, at the largest shapes of its profiles."""
    if hasattr(engine, "device_memory_size_v2"):
        return int(engine.device_memory_size_v2)
    return int(engine.device_memory_size)


def create_context(trt: Any, engine: Any) -> Any:
    """An execution context whose scratch memory the caller brings with `set_scratch`."""
    if hasattr(trt, "ExecutionContextAllocationStrategy"):
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    else:
        context = engine.create_execution_context_without_device_memory()
    if context is None:
        raise BackendError("TensorRT could not create an execution context; is the GPU's memory full?")
    return context


def set_scratch(context: Any, address: int, nbytes: int) -> None:
    """Give a context its scratch memory, aligned to 256 bytes. Contexts that run one after another may share it."""
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(address, nbytes)
    else:
        context.device_memory = address
