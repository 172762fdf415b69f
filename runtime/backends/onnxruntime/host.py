"""ONNX Runtime on host arrays: the CPU, or any of its execution providers by name."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddit.runtime.backends.base import Array, Backend, Engine
from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.manifest import GraphInfo
from ddit.runtime.errors import BackendError, UsageError
from ddit.runtime.shapes import infer

log = logging.getLogger(__name__)

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
FLOAT8 = "cuda-fp8"  # the backend whose twins have FP8 products
FATAL = 4  # ONNX Runtime's level of messages: what it raises says all that its errors log

# Weights of the levels, in bytes, up to which the CPU's sessions get copies of their own. On two cores the demo model's
# coarse steps, which spend their time on reading weights, are a fifth faster then.
PREPACK_LIMIT = 500_000_000

# ONNX Runtime's optimizers that compute with weights when a session is opened. The second makes float32 of the weights
# in half precision that the CPU has no kernels for.
FOLDING = ("ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer")


def import_onnxruntime() -> Any:
    """ONNX Runtime, or a `BackendError` that says how to install it."""
    try:
        import onnxruntime
    except ImportError:
        raise BackendError(
            "ONNX Runtime is not installed; choose one: pip install 'ddit[cpu]' or pip install 'ddit[cuda]'"
        ) from None
    onnxruntime.set_default_logger_severity(FATAL)  # it warns of plug-ins that nobody asked for
    return onnxruntime


@contextmanager
def engine_errors(what: str) -> Iterator[None]:
    """Turn ONNX Runtime's exceptions, which share no base class, into one `BackendError` line."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        raise BackendError(f"ONNX Runtime could not {what}: {_first_line(error)}") from error
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime"):
            raise BackendError(f"ONNX Runtime could not {what}: {_first_line(error)}") from error
        raise


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def check_provider(provider: str) -> None:
    """Raise `UsageError` unless ONNX Runtime was built with an execution provider."""
    available = import_onnxruntime().get_available_providers()
    if provider not in available:
        # the two packages install into the same folder
        mend = "; run: pip uninstall onnxruntime && pip install 'ddit[cuda]'" if provider == CUDA else ""
        raise UsageError(f"ONNX Runtime has no provider {provider!r} here; it has: {', '.join(available)}{mend}")


def session_options(threads: int | None = None, *, prepack: bool = False, plan: bool = True) -> Any:
    """Options of every session.

    With ``prepack`` every session copies its weights into the order that products read fastest. Without, they stay
    memory-mapped from the bundle's files, and the levels of a bundle share one copy of the trunk. With ``plan`` all
    buffers of a size become one block after the first run, beside what that run took: memory is needed twice.
    """
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = FATAL  # warnings about the graph are no concern of who runs it
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_mem_pattern = plan
    if threads:
        options.intra_op_num_threads = threads
    return options


def open_session(
    path: Path,
    provider: str = CPU,
    threads: int | None = None,
    *,
    prepack: bool = False,
    plan: bool = True,
    fold: bool = True,
) -> Any:
    """A session over an ONNX file.

    Without ``fold`` nothing that weights alone decide is computed beforehand, as weights in another type would be: it
    takes no memory then, and time at every run.
    """
    check_provider(provider)
    disabled = [] if fold else [*FOLDING]
    with engine_errors(f"load {path.name}"):
        return import_onnxruntime().InferenceSession(
            path,
            session_options(threads, prepack=prepack, plan=plan),
            providers=[provider],
            disabled_optimizers=disabled,
        )


def check_names(session: Any, info: GraphInfo) -> None:
    """Raise `BackendError` where a graph has other inputs or outputs than the manifest says."""
    for found, specs, what in (
        (session.get_inputs(), info.inputs, "inputs"),
        (session.get_outputs(), info.outputs, "outputs"),
    ):
        names, wanted = sorted(one.name for one in found), sorted(spec.name for spec in specs)
        if names != wanted:
            raise BackendError(
                f"{info.file} has the {what} {', '.join(names)}, the manifest says {', '.join(wanted)}; export it again"
            )


class OnnxRuntimeEngine(Engine):
    """A session and its signature. With ``info`` its tensors are held to what the manifest says of them."""

    def __init__(self, session: Any, name: str, info: GraphInfo | None = None):
        self.session = session
        self.name = name
        self.outputs = [output.name for output in session.get_outputs()]
        self._info = info
        self._checked: set[tuple[tuple[int, ...], ...]] = set()  # shapes of inputs whose outputs were right
        if info:
            check_names(session, info)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        """Run the session on host arrays."""
        with engine_errors(f"run {self.name}"):
            values = self.session.run(self.outputs, dict(inputs))
        outputs = dict(zip(self.outputs, values, strict=True))
        if self._info:
            self._check(self._info, inputs, outputs)
        return outputs

    def _check(self, info: GraphInfo, inputs: Mapping[str, Array], outputs: Mapping[str, NDArray[np.float32]]) -> None:
        """Raise `BackendError` for outputs of another shape or type than the manifest says, once for a size."""
        key = tuple(inputs[spec.name].shape for spec in info.inputs)
        if key in self._checked:
            return
        sizes = infer((spec.shape for spec in info.inputs), key)
        for spec in info.outputs:
            found, wanted = outputs[spec.name], spec.resolve(sizes)
            if not isinstance(found, np.ndarray) or found.shape != wanted or found.dtype != spec.dtype:
                what = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else "no array"
                raise BackendError(
                    f"{info.file} gave {spec.name} as {what}, the manifest says {spec.dtype} {wanted}; export it again"
                )
        self._checked.add(key)


class OnnxRuntimeBackend(Backend):
    """One session a graph."""

    twins: str | None = None  # the backend whose twins of the levels run, instead of the graphs themselves

    def __init__(self, bundle: Bundle, name: str = "cpu", threads: int | None = None):
        super().__init__(bundle)
        self.name = name
        self.provider = CPU if name == "cpu" else name
        self.threads = threads
        files = [file for level in bundle.manifest.levels for file in bundle.graph(level.graph).weights]
        self._prepack = sum(bundle.manifest.files[file].size for file in files) <= PREPACK_LIMIT

    def _open(self, graph: str) -> Engine:
        info = self.bundle.graph(graph)
        fold = True
        if self.twins and self.twins in info.twins:
            info, fold = info.on(self.twins), self._prepack  # folding makes float32 of the weights
        path = self.bundle.file(info.file)
        log.info("opening %s with %s", path.name, self.provider)
        self.bundle.verify_small(info.file)
        plan = graph not in self.bundle.manifest.decoder.graphs  # which need more memory than all others
        session = open_session(path, self.provider, self.threads, prepack=self._prepack, plan=plan, fold=fold)
        return OnnxRuntimeEngine(session, graph, info)


class CpuFloat8Backend(OnnxRuntimeBackend):
    """The levels' FP8 twins on the CPU, by the bodies of their functions: the numbers of a GPU without its speed.

    Raises `BackendError` for a bundle without such twins.
    """

    twins = FLOAT8

    def __init__(self, bundle: Bundle, threads: int | None = None):
        require_twins(bundle, FLOAT8)
        super().__init__(bundle, "cpu", threads)
        self.name = "cpu-fp8"


def require_twins(bundle: Bundle, backend: str) -> None:
    """Raise `BackendError` unless every level has a twin for an FP8 backend."""
    manifest = bundle.manifest
    if any(backend not in manifest.graphs[level.graph].twins for level in manifest.levels):
        raise BackendError(f"{bundle.path} has no FP8 twins of its levels; make them: ddit-export fp8 {bundle.path}")
