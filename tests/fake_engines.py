"""A backend without engines: outputs of the right shape at once, on a clock that moves by what they would cost."""

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from ddit.runtime import Pipeline
from ddit.runtime.backends.base import Array, Backend, Engine, FloatArray, Workspace
from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.manifest import TensorSpec
from ddit.runtime.shapes import infer


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def cost(graph: str, sizes: Mapping[str, int]) -> float:
    """Seconds of a call, roughly in a GPU's proportions: something for the call, something for every sample."""
    rows = sizes["B"]
    if graph.startswith("level-"):
        patch = int(graph.removeprefix("level-"))
        return 0.004 + 0.0001 * rows * (sizes["H"] * sizes["W"] // patch**2 + sizes["L"])
    return {"vae_decoder": 0.010 * rows, "t5": 0.002 * rows, "clip": 0.001}.get(graph, 0.0001)


class FakeEngine(Engine):
    def __init__(self, backend: "FakeBackend", graph: str):
        self.backend, self.graph = backend, graph
        self.info = backend.bundle.manifest.graphs[graph]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, FloatArray]:
        sizes = infer((spec.shape for spec in self.info.inputs), (inputs[spec.name].shape for spec in self.info.inputs))
        self.backend.clock.now += cost(self.graph, sizes)
        self.backend.calls[self.graph, sizes["B"]] += 1
        outputs = {spec.name: np.zeros(spec.resolve(sizes), np.float32) for spec in self.info.outputs}
        self.backend.spoil(self.graph, inputs, outputs)
        return outputs


class FakeBackend(Backend):
    """Keeps count of its calls, by graph and rows, and of the workspaces that were not given back."""

    name = "fake"

    def __init__(self, bundle: Bundle, clock: Clock):
        super().__init__(bundle)
        self.clock = clock
        self.calls: Counter[tuple[str, int]] = Counter()
        self.workspaces: list[Workspace] = []
        # may change outputs or raise
        self.spoil: Callable[[str, Mapping[str, Array], dict[str, FloatArray]], None] = lambda *call: None

    def _open(self, graph: str) -> Engine:
        return FakeEngine(self, graph)

    def workspace(self, buffers: Mapping[str, TensorSpec], sizes: Mapping[str, int]) -> Workspace:
        workspace = super().workspace(buffers, sizes)
        self.workspaces.append(workspace)
        return workspace

    def give_back(self, workspace: Workspace) -> None:
        self.workspaces.remove(workspace)


def fake_pipeline(bundle: Bundle) -> tuple[Pipeline, FakeBackend, Clock]:
    clock = Clock()
    backend = FakeBackend(bundle, clock)
    return Pipeline(bundle, backend), backend, clock
