"""The registry of backends, and a backend that somebody else brings: nothing but its own class and its entry."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from conftest import run
from ddit.exporter.cli import main as export
from ddit.runtime import Bundle, Pipeline
from ddit.runtime.backends import registry
from ddit.runtime.backends.artifacts import EngineStore, Target
from ddit.runtime.backends.base import Backend, Engine
from ddit.runtime.backends.building import EngineBuilder
from ddit.runtime.backends.registry import BackendKind, kind_of, kinds, register
from ddit.runtime.cli import main as ddit_run
from ddit.runtime.errors import BackendError
from ddit.runtime.policies import Fixed
from fake_cuda import FakeCuda

SIZE = {"height": 64, "width": 64}


class ReferenceEngine(Engine):
    """A graph as ONNX's reference implementation computes it, in NumPy."""

    def __init__(self, evaluator: ReferenceEvaluator):
        self.evaluator = evaluator

    def run(self, inputs):
        values = self.evaluator.run(None, dict(inputs))
        return dict(zip(self.evaluator.output_names, values, strict=True))


class ReferenceBackend(Backend):
    """Opens a graph, and has the rest from `Backend`."""

    name = "reference"

    def _open(self, graph: str) -> Engine:
        return ReferenceEngine(ReferenceEvaluator(onnx.load(self.bundle.file(self.bundle.graph(graph).file))))


class CopyBuilder(EngineBuilder):
    """An engine is the graph's own file."""

    file = "copy.onnx"

    def __init__(self, report, progress, *, optimization_level=0):
        machine = Target("copy", "Copy", {"version": "1"}, "version 1 of the copier")
        super().__init__(machine, {"optimization_level": optimization_level}, report, progress)

    def _build(self, bundle, profile, graph, temporary):
        return bundle.file(bundle.graph(graph).file).read_bytes(), 0


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_kinds", dict(registry._kinds))


@pytest.fixture
def _reference() -> None:
    register(
        BackendKind(
            name="reference",
            description="ONNX's reference implementation",
            open=lambda bundle, threads: ReferenceBackend(bundle),
            exact_float32=True,
        )
    )


@pytest.mark.usefixtures("_reference")
def test_a_new_backend_makes_the_cpu_s_picture(opset17_bundle):
    options = {"seed": 3, "schedule": Fixed((2, 4, 2, 4)), **SIZE}
    expected = Pipeline.open(opset17_bundle, backend="cpu")("a red circle", **options)
    actual = Pipeline.open(opset17_bundle, backend="reference")("a red circle", **options)
    np.testing.assert_allclose(actual.latent, expected.latent, atol=1e-4)
    assert np.abs(np.asarray(actual.image, int) - np.asarray(expected.image)).max() <= 1


@pytest.mark.usefixtures("_reference")
def test_a_new_backend_is_known_to_the_commands(opset17_bundle, tmp_path):
    assert "reference: ONNX's reference implementation" in " ".join(run(ddit_run, "generate", "--help").stdout.split())

    options = ("--backend", "reference", "--steps", 4, "--height", 64, "--width", 64, "--out", tmp_path / "out.png")
    result = run(ddit_run, "generate", opset17_bundle, "a red circle", *options)
    assert result.exit_code == 0, result.stderr
    assert "backend reference" in result.stderr

    verified = run(ddit_run, "verify", opset17_bundle, "--backend", "reference", "--json")
    assert verified.exit_code == 0, verified.stderr
    report = json.loads(verified.stdout)
    assert (report["backend"], report["passed"], report["without_reference"]) == ("reference", True, [])
    assert {check["tolerance"] for check in report["checks"]} == {1e-5}, "float32 is held to float32's tolerance"


@pytest.fixture
def copies(opset17_bundle, tmp_path) -> Path:
    """A bundle with the engines of a backend that builds them."""

    def no_run(bundle: Bundle, threads: int | None) -> Backend:
        raise BackendError("copies cannot run")

    options = ("optimization_level",)
    register(BackendKind("copy", "copies of graphs", open=no_run, builder=CopyBuilder, build_options=options))
    path = shutil.copytree(opset17_bundle, tmp_path / "a.bundle")
    result = run(export, "engines", path, "--backend", "copy", "--level", 4, "--optimization-level", 2)
    assert result.exit_code == 0, result.stderr
    graphs = len(Bundle.open(path).manifest.graphs) - 1  # all but the other level's
    assert f"{graphs} engines built" in result.stderr
    assert "for version 1 of the copier" in result.stderr
    return path


def test_engines_of_a_new_backend_are_built_once_and_shown(copies):
    again = run(export, "engines", copies, "--backend", "copy", "--level", 4, "--optimization-level", 2)
    assert "0 engines built" in again.stderr
    refused = run(export, "engines", copies, "--backend", "copy", "--workspace", "1GiB")
    assert refused.exit_code == 2
    assert "the engines of copy are built without --workspace; leave it out" in refused.stderr
    refused = run(export, "engines", copies, "--backend", "cpu")
    assert refused.exit_code == 2
    assert "'cpu' is no backend with engines to build; there is: tensorrt, copy" in refused.stderr
    text = run(ddit_run, "inspect", copies).stdout
    assert "Engines for version 1 of the copier" in text
    assert "Backend copy" in text


def test_the_store_keeps_backends_apart_and_names_the_command(copies):
    def target(version: str) -> Target:
        return Target("copy", "Copy", {"version": version}, f"version {version}")

    store = EngineStore(Bundle.open(copies))
    (engine,) = store.find("level-4", target("1"))
    assert engine.file.read_bytes() == (copies / "level-4.onnx").read_bytes()
    command = re.escape(f"run: ddit-export engines {copies} --backend copy")
    with pytest.raises(BackendError, match=f"has no Copy engine of level-2 yet; {command}$"):
        store.find("level-2", target("1"))
    with pytest.raises(BackendError, match=f"was built for version 1 of the copier; this is version 2; {command}$"):
        store.find("level-4", target("2"))
    with pytest.raises(BackendError, match="has no TensorRT engine of level-4 yet"):
        store.find("level-4", Target("tensorrt", "TensorRT", {"version": "1"}, "TensorRT 1"))

    engine.file.write_bytes(b"x" * engine.info.size)
    damaged = run(ddit_run, "verify", copies, "--backend", "cpu")
    assert damaged.exit_code == 1
    assert re.search(f"has a wrong hash; delete its folder and {command}$", damaged.stderr.strip())


def test_the_automatic_choice_takes_the_first_that_opens(tiny_bundle, monkeypatch, caplog):
    FakeCuda().install(monkeypatch)
    for name, rank, device in (("first", 1, "gpu"), ("second", 2, "host"), ("unranked", None, "host")):

        def opener(bundle: Bundle, threads: int | None, name: str = name) -> Backend:
            if name == "second":
                return ReferenceBackend(bundle)
            raise BackendError(f"{name} is not here")

        register(BackendKind(name=name, description=name, open=opener, device=device, rank=rank))
    ranked, unranked = (
        ["first", "second", "tensorrt", "cuda", "cpu"],
        ["cpu-fp8", "cuda-fp8", "tensorrt-rtx", "unranked"],
    )
    assert [kind.name for kind in kinds()] == ranked + unranked
    assert isinstance(registry.open_backend(None, Bundle.open(tiny_bundle)), ReferenceBackend)
    assert [record.getMessage() for record in caplog.records] == ["not first: first is not here"]

    FakeCuda().install(monkeypatch).devices = 0
    caplog.clear()
    assert isinstance(registry.open_backend(None, Bundle.open(tiny_bundle)), ReferenceBackend)
    assert not caplog.records, "without a GPU its backends are not tried"


def test_names_are_unique_and_unknown_ones_are_execution_providers(tiny_bundle):
    with pytest.raises(ValueError, match="there is a backend 'cpu' already"):
        register(kind_of("cpu"))
    assert not kind_of("CPUExecutionProvider").exact_float32
    assert registry.open_backend("CPUExecutionProvider", Bundle.open(tiny_bundle)).provider == "CPUExecutionProvider"
