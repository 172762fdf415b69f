"""Backends: what opens a bundle's graphs and runs them.

>>> backend = open_backend("cpu", bundle)
>>> engine = backend.engine("level-4")
>>> engine.run({"latent": latent, ...})["velocity"]
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from ddit.runtime.bundle import Bundle

Array = NDArray[np.float32] | NDArray[np.int64]


class Engine(ABC):
    """A graph that can be run. `run` may be called from several threads at once."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Array]) -> dict[str, NDArray[np.float32]]:
        """Run the graph on its named inputs; returns its named outputs."""


class Backend(ABC):
    """Opens a bundle's graphs, each once and only when it is first asked for."""

    name: str

    def __init__(self, bundle: Bundle):
        self.bundle = bundle
        self._engines: dict[str, Engine] = {}
        self._lock = Lock()

    def engine(self, graph: str) -> Engine:
        """The engine of a graph. Opening is serialised, so that two threads do not load the same weights."""
        with self._lock:
            if graph not in self._engines:
                self._engines[graph] = self._open(graph)
            return self._engines[graph]

    @abstractmethod
    def _open(self, graph: str) -> Engine:
        """Load a graph. Raises `BackendError`."""


def open_backend(name: str, bundle: Bundle, threads: int | None = None) -> Backend:
    """A backend by name: ``cpu``, ``cuda``, or the name of any ONNX Runtime execution provider."""
    from ddit.runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(bundle, name, threads)
