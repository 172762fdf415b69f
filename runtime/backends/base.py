"""Backends: what opens a bundle's graphs and runs them.

>>> backend = open_backend("cpu", bundle)
>>> engine = backend.engine("level-4")
>>> engine.run({"latent": latent, ...})["velocity"]

The denoising loop does not call the levels' engines itself: a backend's `Denoiser` holds a run's state where the
backend computes, on the host or on the GPU.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from ddit.runtime.bundle import Bundle, Manifest

FloatArray = NDArray[np.float32]
Array = FloatArray | NDArray[np.int64]

STATE = ("latent", "difference1", "difference2", "clean")  # the step graph gives each back as next_…
DEVIATION = "deviation_"  # its other outputs: deviation_4 for patch 4


class Engine(ABC):
    """A graph that can be run. `run` may be called from several threads at once."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Array]) -> dict[str, FloatArray]:
        """Run the graph on its named inputs; returns its named outputs."""


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    latent: FloatArray  # noise (B, C, H, W)
    conditions: Mapping[str, FloatArray]  # the level graphs' inputs that stay the same: context, pooled, guidance
    sigmas: FloatArray  # noise levels (steps + 1), the last is 0
    rotary: Callable[[int], tuple[FloatArray, FloatArray]]  # tables of cosines and sines by patch
    carry: float  # share of the last native step's detail that coarse steps take over


class Detail:
    """What a run's steps carry on of the native level's detail: two inputs of the step graph."""

    def __init__(self, manifest: Manifest, carry: float):
        self._native = manifest.native
        self._coarse = [patch for patch in manifest.patches if patch != manifest.native]
        self._carry = carry
        self._known: set[int] = set()

    def share(self, patch: int, members: Sequence[int]) -> float:
        """The share for a step of some samples; none before each of them has had a native step."""
        if patch == self._native:
            self._known.update(members)
            return 0.0
        return self._carry if self._known.issuperset(members) else 0.0

    def inputs(self, patch: int, share: float, batch: int) -> dict[str, FloatArray]:
        """``refresh`` (B) and, with coarse levels, ``carry`` (B, coarse patches) after a step at a level."""
        inputs = {"refresh": np.full(batch, patch == self._native, dtype=np.float32)}
        if self._coarse:
            row = [share if patch == coarse else 0.0 for coarse in self._coarse]
            inputs["carry"] = np.tile(np.asarray(row, dtype=np.float32), (batch, 1))
        return inputs


class Denoiser(ABC):
    """A run's state: latents, differences and the kept estimate of its samples. Belongs to one thread."""

    @abstractmethod
    def step(self, number: int, patch: int, members: Sequence[int]) -> dict[int, FloatArray]:
        """Denoise the samples ``members`` at a level and return the deviations (len(members), H/p, W/p) by patch.

        ``number`` counts a run's steps from 0.
        """

    @abstractmethod
    def latent(self) -> FloatArray:
        """The samples' latents (B, C, H, W)."""


class Backend(ABC):
    """Opens a bundle's graphs, each once and only when it is first asked for."""

    name: str

    def __init__(self, bundle: Bundle):
        self.bundle = bundle
        self._engines: dict[str, Engine] = {}
        self._lock = Lock()

    def __str__(self) -> str:
        return self.name

    def memory_used(self) -> int | None:
        """Bytes of GPU memory that this backend holds; None for one that runs on the host."""
        return None

    def engine(self, graph: str) -> Engine:
        """The engine of a graph. Opening is serialised, so that two threads do not load the same weights."""
        with self._lock:
            if graph not in self._engines:
                self._engines[graph] = self._open(graph)
            return self._engines[graph]

    @abstractmethod
    def _open(self, graph: str) -> Engine:
        """Load a graph. Raises `BackendError`."""

    def level(self, patch: int) -> Engine:
        """The engine of a level."""
        return self.engine(self.bundle.manifest.level(patch).graph)

    def check(self, *, height: int, width: int, text: int, batch: int) -> None:  # noqa: B027
        """Raise `UsageError` for sizes that this backend's engines cannot run, before anything is loaded."""

    def denoiser(self, start: Start) -> AbstractContextManager[Denoiser]:
        """The state of a new run, for as long as the run lasts."""
        return nullcontext(HostDenoiser(self, start))


class HostDenoiser(Denoiser):
    """The state as host arrays, for engines that take and give those."""

    def __init__(self, backend: Backend, start: Start):
        self._backend = backend
        self._start = start
        self._detail = Detail(backend.bundle.manifest, start.carry)
        self._state = {name: np.zeros_like(start.latent) for name in STATE} | {"latent": start.latent.copy()}

    def step(self, number: int, patch: int, members: Sequence[int]) -> dict[int, FloatArray]:
        """Run the level's engine and the step graph on the members' rows."""
        start, rows = self._start, list(members)
        cos, sin = start.rotary(patch)
        sigma, after = start.sigmas[number : number + 2]
        now = {name: value[rows] for name, value in self._state.items()}
        timestep = np.full(len(rows), sigma, dtype=np.float32)
        velocity = self._backend.level(patch).run(
            {
                "latent": now["latent"],
                "timestep": timestep,
                "rope_cos": cos,
                "rope_sin": sin,
                **{name: value[rows] for name, value in start.conditions.items()},
            }
        )["velocity"]
        dt = np.full(len(rows), after - sigma, dtype=np.float32)
        detail = self._detail.inputs(patch, self._detail.share(patch, rows), len(rows))
        outputs = self._backend.engine("step").run(
            {**now, **detail, "velocity": velocity, "timestep": timestep, "dt": dt}
        )
        for name, value in self._state.items():
            value[rows] = outputs[f"next_{name}"]
        return deviations(outputs)

    def latent(self) -> FloatArray:
        """The samples' latents."""
        return self._state["latent"]


def deviations(outputs: Mapping[str, FloatArray]) -> dict[int, FloatArray]:
    """The step graph's deviations by patch."""
    return {int(name.removeprefix(DEVIATION)): value for name, value in outputs.items() if name.startswith(DEVIATION)}
