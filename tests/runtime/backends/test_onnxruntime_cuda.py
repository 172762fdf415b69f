"""ONNX Runtime's CUDA backend without a GPU: its sessions run on the CPU, in the order of the fake GPU's stream."""

import gc
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from conftest import run
from ddit.exporter.cli import main as ddit_export
from ddit.exporter.graphs import float8
from ddit.runtime import Bundle, Pipeline, Request
from ddit.runtime.backends.onnxruntime import cuda as onnxruntime_cuda
from ddit.runtime.backends.onnxruntime import host
from ddit.runtime.backends.onnxruntime.cuda import CudaBackend, CudaFloat8Backend
from ddit.runtime.cli import main as ddit_run
from ddit.runtime.errors import BackendError, UsageError
from ddit.runtime.policies import Fixed
from fake_cuda import FakeCuda

SIZE = {"height": 128, "width": 64}


class Session:
    """A session on the CPU that pretends to be on the GPU."""

    def __init__(self, ort: "FakeOnnxRuntime", path, options, providers):
        ((name, settings),) = providers
        assert name == "CUDAExecutionProvider"
        assert settings["user_compute_stream"] == "77"
        if ort.refuses_graphs and "enable_cuda_graph" in settings:
            raise RuntimeError("a node of this graph runs on the CPU")
        self.ort = ort
        ort.opened.append(path.name)
        weakref.finalize(self, ort.cuda.events.append, "a session ended")
        self.session = onnxruntime.InferenceSession(path, options)
        self.replays = "enable_cuda_graph" in settings
        self.captured: set[str] = set()  # graphs
        self.get_inputs, self.get_outputs = self.session.get_inputs, self.session.get_outputs

    def io_binding(self):
        binding = self.session.io_binding()

        def bind(function):
            def on_cpu(name, device, number, dtype, shape, address):
                assert (device, number) == ("cuda", 0)
                function(name, "cpu", 0, dtype, shape, address)

            return on_cpu

        return SimpleNamespace(real=binding, bind_input=bind(binding.bind_input), bind_output=bind(binding.bind_output))

    def get_provider_graph_assignment_info(self):
        """As if the provider had no kernel for a norm where it refuses to capture the graph."""

        def part(name: str, *nodes: str) -> SimpleNamespace:
            listed = [SimpleNamespace(op_type=node, name=f"node_{node}") for node in nodes]
            return SimpleNamespace(ep_name=name, get_nodes=lambda: listed)

        odd = ("RMSNormalization",) if self.ort.refuses_graphs else ()
        return [part("CUDAExecutionProvider", "MatMul", "Add"), part("CPUExecutionProvider", "Shape", "Concat", *odd)]

    def run_with_iobinding(self, binding, options):
        graph = options.get_run_config_entry("gpu_graph_id") if self.replays else onnxruntime_cuda.NO_GRAPH
        if self.replays:
            self.ort.graph_ids.append(graph)
        # only a replay may go on without being waited for: other runs would keep their pinned memory
        assert waits(options) == (graph == onnxruntime_cuda.NO_GRAPH or graph not in self.captured)
        self.captured.add(graph)
        self.ort.cuda.submit(lambda: self.session.run_with_iobinding(binding.real))


def waits(options) -> bool:
    """Whether a run with these options is waited for."""
    try:
        return options.get_run_config_entry("disable_synchronize_execution_providers") != "1"
    except RuntimeError:  # it is not set
        return True


class FakeOnnxRuntime:
    """The parts of ONNX Runtime that the backend uses."""

    RunOptions = onnxruntime.RunOptions

    def __init__(self, cuda: FakeCuda):
        self.cuda = cuda
        self.refuses_graphs = False
        self.cudnn: tuple[int, ...] | None = (9, 13, 0)
        self.graph_ids: list[str] = []
        self.opened: list[str] = []  # files
        self.OrtValue = onnxruntime.OrtValue

    def InferenceSession(self, path, options, providers):  # noqa: N802
        return Session(self, path, options, providers)


@pytest.fixture
def machine(monkeypatch) -> FakeOnnxRuntime:
    fake = FakeOnnxRuntime(FakeCuda().install(monkeypatch))
    monkeypatch.setattr(host, "PREPACK_LIMIT", 0)  # as the fake runs its graphs, for equality bit by bit
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(onnxruntime_cuda, "find_cudnn", lambda: fake.cudnn)
    monkeypatch.setattr(onnxruntime_cuda.kernels, "load_kernels", lambda _: None)  # test_load_kernels.py
    backend_init = CudaBackend.__init__

    def init(self, bundle):
        backend_init(self, bundle)
        monkeypatch.setattr(onnxruntime_cuda, "import_onnxruntime", lambda: fake)

    monkeypatch.setattr(CudaBackend, "__init__", init)
    return fake


@pytest.fixture
def plain_bundle(tiny_bundle, tmp_path) -> Path:
    """The bundle without twins, as exporters wrote it before there were any: the backend runs what the CPU runs."""
    path = shutil.copytree(tiny_bundle, tmp_path / "plain.bundle")
    manifest = json.loads((path / "bundle.json").read_text())
    for graph in manifest["graphs"].values():
        for file in graph.pop("twins").values():
            (path / file).unlink()
            del manifest["files"][file]
    manifest["parity"] = [
        {name: value for name, value in result.items() if name not in ("twin", "note")}
        for result in manifest["parity"]
        if result["twin"] is None
    ]
    (path / "bundle.json").write_text(json.dumps(manifest))
    return path


def test_levels_run_as_their_twins(machine, tiny_bundle):
    """And only here: the CPU runs the graphs themselves."""
    levels = Fixed((2, 4, 8) * 3)
    expected = Pipeline.open(tiny_bundle, backend="cpu")("a red circle", seed=3, schedule=levels, **SIZE)
    assert not machine.opened
    actual = Pipeline.open(tiny_bundle, backend="cuda")("a red circle", seed=3, schedule=levels, **SIZE)
    assert {name for name in machine.opened if name.startswith("level-")} == {f"level-{p}.cuda.onnx" for p in (2, 4, 8)}
    assert not np.array_equal(actual.latent, expected.latent)
    np.testing.assert_allclose(actual.latent, expected.latent, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("refuses_graphs", [False, True])
def test_the_picture_is_the_cpu_s(machine, plain_bundle, refuses_graphs):
    machine.refuses_graphs = refuses_graphs
    levels = Fixed((2, 4, 8) * 3)
    expected = Pipeline.open(plain_bundle, backend="cpu")("a red circle", seed=3, schedule=levels, **SIZE)
    actual = Pipeline.open(plain_bundle, backend="cuda")("a red circle", seed=3, schedule=levels, **SIZE)
    np.testing.assert_array_equal(actual.latent, expected.latent)
    np.testing.assert_array_equal(np.asarray(actual.image), np.asarray(expected.image))
    # a level and a size have one graph, whatever comes between their steps
    assert len(set(machine.graph_ids)) == (0 if refuses_graphs else 3)


def test_a_gate_s_state_stays_on_the_device(machine, plain_bundle):
    """Samples that look at it and one that does not regroup as they decide, and are as on the CPU."""
    schedules = ["teacache:0.4", "dynamic:tau=2+teacache:0.9", "native", "spectralcache:1"]
    requests = [Request("a red circle", seed, 8, text, 64, 64) for seed, text in enumerate(schedules)]
    expected = Pipeline.open(plain_bundle, backend="cpu").run(requests)
    actual = Pipeline.open(plain_bundle, backend="cuda").run(requests)
    assert [result.trace.predicted > 0 for result in actual] == [True, True, False, True]
    for one, other in zip(actual, expected, strict=True):
        assert one.trace.levels == other.trace.levels
        assert [step.figures for step in one.trace.steps] == [step.figures for step in other.trace.steps]
        np.testing.assert_array_equal(one.latent, other.latent)


def test_a_latent_grows_as_on_the_host(machine, plain_bundle):
    run = {"seed": 3, "steps": 6, "schedule": "progressive:delta=0.5", "height": 256, "width": 128}
    expected = Pipeline.open(plain_bundle, backend="cpu")("a red circle", **run)
    actual = Pipeline.open(plain_bundle, backend="cuda")("a red circle", **run)
    assert {record.scale for record in actual.trace.steps} == {0.5, 1.0}
    np.testing.assert_array_equal(actual.latent, expected.latent)


def test_levels_share_one_copy_of_the_trunk(machine, tiny_bundle):
    pipeline = Pipeline.open(tiny_bundle, backend="cuda")  # kept: with it goes what it holds on the device
    pipeline("red", schedule=Fixed((2, 4, 8)), **SIZE)
    entries = onnxruntime_cuda.safetensors_entries(np.memmap(tiny_bundle / "transformer.safetensors", mode="r"))
    trunk = sum(nbytes for *_, nbytes in entries)
    assert sum(len(block) >= trunk for block in machine.cuda.memory.values()) == 1


@pytest.fixture
def float8_bundle(tiny_bundle, tmp_path, monkeypatch) -> Path:
    """The bundle with FP8 twins, on a machine that has FP8."""
    monkeypatch.setattr(float8, "FEWEST", 16)
    path = shutil.copytree(tiny_bundle, tmp_path / "float8.bundle")
    assert run(ddit_export, "fp8", path).exit_code == 0
    monkeypatch.setattr(onnxruntime_cuda.kernels, "load_kernels", lambda _: Path("operators.so"))
    monkeypatch.setattr(onnxruntime_cuda.kernels, "why_no_float8", lambda _: None)
    return path


def test_levels_in_fp8_share_their_weights_and_leave_the_others_out(machine, float8_bundle):
    levels = {"seed": 3, "schedule": Fixed((2, 4, 8)), **SIZE}
    expected = Pipeline.open(float8_bundle, backend="cpu-fp8")("a red circle", **levels)
    pipeline = Pipeline.open(float8_bundle, backend="cuda-fp8")
    pipeline.backend._kernels = None  # here the functions run
    actual = pipeline("a red circle", **levels)
    opened = [name for name in machine.opened if name.startswith("level-")]
    assert opened == [f"level-{patch}.cuda-fp8.onnx" for patch in (2, 4, 8)]
    np.testing.assert_allclose(actual.latent, expected.latent, rtol=1e-3, atol=1e-3)
    weights = pipeline.backend._sessions.weights
    rounded = {name.removesuffix(".fp8") for name in weights["cuda-fp8.safetensors"] if name.endswith(".fp8")}
    assert rounded
    assert not rounded & weights["transformer.safetensors"].keys()
    stored = np.memmap(float8_bundle / "transformer.safetensors", mode="r")
    names = {name for name, *_ in onnxruntime_cuda.safetensors_entries(stored)}
    assert weights["transformer.safetensors"].keys() == names - rounded


def test_without_fp8_the_other_twins_run_and_a_warning_says_why(machine, float8_bundle, monkeypatch, caplog):
    monkeypatch.setattr(onnxruntime_cuda.kernels, "why_no_float8", lambda _: "the GPU is too old")
    backend = CudaFloat8Backend(Bundle.open(float8_bundle))
    backend._kernels = None
    backend.engine("level-2")
    assert machine.opened == ["level-2.cuda.onnx"]
    assert "cuda-fp8.safetensors" not in backend._sessions.weights
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == "no FP8 here, and the levels run as on --backend cuda: the GPU is too old"


def test_bfloat16_weights_reach_the_sessions_as_such(machine, tiny_bundle, tmp_path):
    values = {"a": torch.tensor([[1.5, -2.0, 3e38]], dtype=torch.bfloat16), "b": torch.tensor([0.1])}
    save_file(values, tmp_path / "weights.safetensors")
    uploaded = CudaBackend(Bundle.open(tiny_bundle))._upload(tmp_path / "weights.safetensors")
    assert {name: value.data_type() for name, value in uploaded.items()} == {
        "a": "tensor(bfloat16)",
        "b": "tensor(float)",
    }
    assert torch.equal(torch.from_dlpack(uploaded["a"]._ortvalue), values["a"])


def test_sessions_end_before_the_stream_that_they_wait_for(machine, tiny_bundle):
    pipeline = Pipeline.open(tiny_bundle, backend="cuda")
    pipeline("red", schedule=Fixed((2, 4, 8)), **SIZE)
    loop = {"pipeline": pipeline}
    loop["itself"] = loop  # what an exception's traceback can do: the garbage collector takes it apart in any order
    del pipeline, loop
    gc.collect()
    *sessions, last = machine.cuda.events
    assert sessions == ["a session ended"] * 7
    assert last == "the stream was destroyed"


def test_too_little_memory_is_said_before_anything_is_loaded(machine, tiny_bundle):
    machine.cuda.total = 1000
    with pytest.raises(BackendError, match=r"GPU memory is too small: the weights need 0\.00 GB"):
        Pipeline.open(tiny_bundle, backend="cuda")


def test_without_the_provider_the_available_ones_are_named(tiny_bundle):
    words = r"ONNX Runtime has no provider 'CUDAExecutionProvider' here; it has: .*CPU.*; run: .*'ddit\[cuda\]'"
    with pytest.raises(UsageError, match=words):
        Pipeline.open(tiny_bundle, backend="cuda")


def test_a_node_without_a_kernel_is_not_silent(machine, tiny_bundle, caplog):
    machine.refuses_graphs = True
    backend = CudaBackend(Bundle.open(tiny_bundle))
    backend.engine("level-4")
    backend.engine("step")
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said == [
        "level-4.cuda.onnx runs partly on the CPU, and slower for it: RMSNormalization node_RMSNormalization"
    ]


@pytest.mark.parametrize(("cudnn", "warns"), [((9, 13, 0), False), (None, True)])
def test_a_missing_cudnn_is_not_silent(machine, tiny_bundle, tmp_path, caplog, cudnn, warns):
    machine.cudnn = cudnn
    picture = ("--out", tmp_path / "a.png", "--steps", 4, "--height", 64, "--width", 64)
    result = run(ddit_run, "generate", tiny_bundle, "red", "--backend", "cuda", *picture)
    assert result.exit_code == 0, result.stderr
    assert any("cuDNN 9 is not found" in record.getMessage() for record in caplog.records) == warns


def test_cudnn_s_version(monkeypatch):
    library = SimpleNamespace(cudnnGetVersion=lambda: 91301)
    monkeypatch.setattr(onnxruntime_cuda.ctypes, "CDLL", lambda name: library)
    assert onnxruntime_cuda.find_cudnn() == (9, 13, 1)
    monkeypatch.setattr(onnxruntime_cuda.ctypes, "CDLL", lambda name: SimpleNamespace())
    assert onnxruntime_cuda.find_cudnn() is None
    monkeypatch.undo()
    monkeypatch.setattr(onnxruntime_cuda, "CUDNN", "libnothing.so.9")
    assert onnxruntime_cuda.find_cudnn() is None


@pytest.mark.parametrize(
    ("dtype", "capability", "cudnn", "twin", "kernel"),
    [
        ("fp16", "9.0", (9, 13, 0), True, "cuDNN"),
        ("bf16", "12.0", (9, 3, 0), True, "cuDNN"),
        ("fp16", "9.0", (9, 13, 0), False, "Flash-2"),
        ("fp16", "9.0", (9, 2, 1), True, "Flash-2"),
        ("fp16", "9.0", None, True, "Flash-2"),
        ("fp16", "8.9", (9, 13, 0), True, "Flash-2"),
        ("fp32", "9.0", (9, 13, 0), True, "memory-efficient"),
        ("fp16", "7.5", (9, 13, 0), True, "memory-efficient"),
    ],
)
def test_the_attention_kernel_to_expect(dtype, capability, cudnn, twin, kernel):
    assert onnxruntime_cuda.attention_kernel(dtype, capability, cudnn, twin=twin) == kernel


@pytest.mark.parametrize("refuses_graphs", [False, True])
def test_doctor_on_a_machine_with_a_gpu(machine, tiny_bundle, refuses_graphs):
    machine.refuses_graphs = refuses_graphs
    result = run(ddit_run, "doctor", tiny_bundle, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    gpu = report["machine"]["gpu"]
    assert (gpu["name"], gpu["capability"], gpu["driver"]) == ("Fake GPU", "9.0", "13.0")
    assert report["machine"]["cudnn"] == "9.13.0"
    ready = {one["name"]: one["ready"] for one in report["backends"]}
    assert (ready["cuda"], ready["cpu"], ready["tensorrt"]) == (True, True, False)
    odd = ["RMSNormalization node_RMSNormalization"] if refuses_graphs else []
    assert report["levels"] == [
        {
            "graph": f"level-{patch}",
            "file": f"level-{patch}.cuda.onnx",
            "attention": {"Fake GPU": "memory-efficient"},  # the bundle is in float32
            "on_cpu": odd,
        }
        for patch in (2, 4, 8)
    ]
    shown = run(ddit_run, "doctor", tiny_bundle)
    assert "Fake GPU, compute capability 9.0" in shown.stdout
    assert ("RMSNormalization" in shown.stdout) == refuses_graphs
