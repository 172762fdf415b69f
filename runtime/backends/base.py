"""Backends: what opens a bundle's graphs and runs them.

    open_backend("cpu", bundle).engine("vae_decoder").run({"latent": latent})["image"]

Encoders and decoder are run through their engines. Denoising steps run in a `Workspace`, which holds the state of the
samples that run together where the backend computes: on the host or on the GPU.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.manifest import TensorSpec
from ddit.runtime.step import Program

FloatArray = NDArray[np.float32]
Array = FloatArray | NDArray[np.int64]


class Engine(ABC):
    """A graph that can be run. `run` may be called from several threads at once."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Array]) -> dict[str, FloatArray]:
        """Run the graph on its named inputs; returns its named outputs."""


class Workspace(ABC):
    """The buffers of some samples at one size, on which step programs run.

    A buffer (B, …) has one row for every sample. Belongs to one thread at a time.
    """

    def __init__(self, sizes: Mapping[str, int]):
        """``sizes``: the symbols' values; ``B`` is the number of samples."""
        self.sizes = dict(sizes)

    @abstractmethod
    def write(self, name: str, row: int, values: FloatArray) -> None:
        """Set a sample's row of a buffer."""

    @abstractmethod
    def read(self, name: str, row: int) -> FloatArray:
        """A copy of a sample's row of a buffer."""

    @abstractmethod
    def take(self, names: Sequence[str], row: int, source: "Workspace", source_row: int, count: int = 1) -> None:
        """Copy rows of buffers, ``count`` in a row, from another workspace of the same backend and size."""

    @abstractmethod
    def run(self, program: Program, inputs: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        """Run a step of all samples and return the program's results.

        ``inputs`` are the buffers (B, …) that are new at every step. Raises `BackendError` when an engine fails.
        """


class Backend(ABC):
    """Opens a bundle's graphs, each once and only when it is first asked for.

    A backend that runs on arrays of the host gives `_open` and nothing else.
    """

    name: str
    low_memory = False  # text encoders and levels do not fit together: whoever runs both calls `release` in between

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
        """The engine of a graph. Opening is serialised, so that two threads do not load the same weights.

        Raises `BackendError`, or `BundleError` where the bundle was exported again since it was opened.
        """
        with self._lock:
            if graph not in self._engines:
                with self.bundle.unchanged():
                    engine = self._open(graph)
                self._engines[graph] = engine
            return self._engines[graph]

    @abstractmethod
    def _open(self, graph: str) -> Engine:
        """Load a graph. Raises `BackendError`."""

    def release(self) -> None:
        """Let go of every engine and of what is kept between runs. No sample may be in flight."""
        with self._lock:
            self._engines.clear()

    def phases(self) -> tuple[frozenset[str], frozenset[str]]:
        """The graphs that a run needs at first, its text encoders, and those that it needs then."""
        manifest = self.bundle.manifest
        first = frozenset(one.graph for one in manifest.encoders)
        return first, frozenset(manifest.graphs) - first

    def check(self, sizes: Mapping[str, int], graphs: Collection[str] | None = None) -> None:  # noqa: B027
        """Raise `UsageError` for sizes that this backend's engines cannot run, before anything is loaded.

        ``sizes``: pixels, frames, tokens and the batch by the names that profiles use. ``graphs``: those that are to
        run at these sizes; all when None.
        """

    def workspace(self, buffers: Mapping[str, TensorSpec], sizes: Mapping[str, int]) -> Workspace:
        """A workspace that nobody uses, with buffers of these names; what they hold is not defined."""
        from ddit.runtime.backends.host import HostWorkspace

        return HostWorkspace(self, buffers, sizes)

    def give_back(self, workspace: Workspace) -> None:  # noqa: B027
        """Take back a workspace that no sample is left in; a later group of the same size may get it."""
