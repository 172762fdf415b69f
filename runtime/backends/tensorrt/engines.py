"""What TensorRT's engines depend on beside the graph and the profile, and which of them serves a size."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from ddit.runtime.backends.artifacts import StoredEngine, Target
from ddit.runtime.backends.device.cuda import Gpu
from ddit.runtime.errors import UsageError

OPTIMIZATION_LEVEL = 3  # TensorRT's own default


class BuilderOptions(BaseModel):
    """Options of TensorRT's builder that change the engine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    optimization_level: int = OPTIMIZATION_LEVEL
    workspace: int | None = None  # bytes; None: what the GPU has


def this_target(trt: Any, gpu: Gpu) -> Target:
    """What engines must be built with and for to run here."""
    version = trt.__version__
    return Target(
        backend="tensorrt",
        title="TensorRT",
        needs={"tensorrt": version, "gpu": gpu.name, "compute_capability": gpu.capability},
        words=f"{gpu.name} (compute capability {gpu.capability}), TensorRT {version}",
    )


def choose(engines: Sequence[StoredEngine], sizes: Mapping[str, int]) -> tuple[StoredEngine, int]:
    """The first engine whose profile holds the sizes (height, width, text, batch or some), and the entry's index.

    The entry's index is that of the engine's optimisation profile. Raises `UsageError`.
    """
    for engine in engines:
        for index, entry in enumerate(engine.info.profile.entry):
            if entry.contains(**sizes):
                return engine, index
    asked = ", ".join(f"{name} {value}" for name, value in sizes.items())
    built = "; or ".join(str(engine.info.profile) for engine in engines)
    raise UsageError(
        f"{asked} is outside what the TensorRT engine of {engines[0].info.graph} was built for ({built}); "
        f"build another: {engines[0].build_command} --profile PROFILE"
    )
