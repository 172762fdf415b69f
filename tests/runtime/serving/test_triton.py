"""A bundle in NVIDIA's Triton server: the real server of the wheel nvidia-pytriton, on the CPU."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from conftest import make_once, run
from ddit.exporter.cli import main
from ddit.runtime import Bundle, Pipeline
from ddit.runtime.errors import BackendError, DditError
from ddit.runtime.serving.triton import Model
from fake_engines import fake_pipeline
from triton_server import make_server

TYPES = {"prompt": "BYTES", "schedule": "BYTES", "reuse": "BYTES", "negative_prompt": "BYTES", "priority": "BYTES"}
NUMBERS = {"seed": ("INT64", np.int64), "budget": ("FP32", np.float32), "guidance": ("FP32", np.float32)}
SMALL = {"height": 64, "width": 64}
PATIENCE = 30.0  # seconds


@pytest.fixture(scope="module")
def tritonserver(shared_folder) -> Path:
    """The server's program."""
    pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    try:
        return make_once(shared_folder / "tritonserver", make_server) / "tritonserver"
    except DditError as error:
        pytest.skip(str(error))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@dataclass
class Served:
    """A client's view of a server."""

    port: int
    process: subprocess.Popen
    log: Path

    def ready(self) -> bool:
        """Whether every model is."""
        import tritonclient.http as http

        try:
            return http.InferenceServerClient(f"127.0.0.1:{self.port}").is_server_ready()
        except OSError:
            return False

    def ask(self, model: str, **values: object) -> tuple[np.ndarray, dict]:
        """The pixels and the report for one request."""
        import tritonclient.http as http

        client = http.InferenceServerClient(f"127.0.0.1:{self.port}", network_timeout=PATIENCE)
        tensors = []
        for name, value in values.items():
            kind, dtype = NUMBERS.get(name, (TYPES.get(name, "INT32"), np.int32))
            array = np.array([value.encode()], np.object_) if isinstance(value, str) else np.array([value], dtype)
            tensors.append(http.InferInput(name, [1], kind))
            tensors[-1].set_data_from_numpy(array)
        result = client.infer(model, tensors)
        pixels = next(found for name in ("image", "clip") if (found := result.as_numpy(name)) is not None)
        return pixels, json.loads(result.as_numpy("report")[0])


@pytest.fixture(scope="module")
def server(tritonserver, tiny_bundle, wan_bundle, tmp_path_factory) -> Iterator[Served]:
    """Triton with a bundle of pictures and one of clips."""
    folder = tmp_path_factory.mktemp("triton")
    models = folder / "models"
    for bundle, options in ((tiny_bundle, ("--copy",)), (wan_bundle, ())):
        result = run(main, "triton", bundle, models, "--backend", "cpu", "--threads", 1, *options)
        assert result.exit_code == 0, result.stderr
    port, log = free_port(), folder / "log"
    command = [tritonserver, "--model-repository", models, "--http-address", "127.0.0.1", "--http-port", str(port)]
    command += ["--allow-grpc", "false", "--allow-metrics", "false"]
    with log.open("wb") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as process:
        served, end = Served(port, process, log), time.monotonic() + PATIENCE
        try:
            while not served.ready():
                assert process.poll() is None, log.read_text(errors="replace")[-3000:]
                assert time.monotonic() < end, log.read_text(errors="replace")[-3000:]
                time.sleep(0.1)
            yield served
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0, log.read_text(errors="replace")[-3000:]
        finally:
            process.kill()


def close(pixels: np.ndarray, image) -> bool:
    return pixels.dtype == np.uint8 and int(np.abs(pixels.astype(int) - np.asarray(image, int)).max()) <= 1


def test_pictures_are_the_runtime_s_several_at_once(server, tiny_bundle):
    pipeline = Pipeline.open(tiny_bundle, backend="cpu")
    requests = [
        {"prompt": "a red circle", "seed": seed, "steps": 6, "schedule": schedule, **SMALL}
        for seed, schedule in enumerate(["native", "adaptive", "dynamic:warmup=3", "native", "native", "native"])
    ]
    requests.append({"prompt": "a blue star", "seed": 2**40, "schedule": "native", "reuse": "taylorseer:3"})
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda values: server.ask("tiny", **values), requests))
    for values, (pixels, report) in zip(requests, answers, strict=True):
        options = {name: value for name, value in values.items() if name != "reuse"}
        if "reuse" in values:
            options["schedule"] += f"+{values['reuse']}"
        alone = pipeline(options.pop("prompt"), **options)
        assert close(pixels, alone.image)
        assert report["seed"] == values["seed"]
        assert report["schedule"] == alone.trace.schedule["text"]
        assert report["steps_per_level"] == {str(k): n for k, n in alone.trace.steps_per_level().items()}


def test_a_short_request_does_not_wait_for_a_long_one(server):
    done = []
    asks = {"long": {"steps": 600}, "short": {"steps": 2, **SMALL}}

    def ask(name: str) -> None:
        server.ask("tiny", prompt="a star", seed=1, schedule="native", **asks[name])
        done.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in asks]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert done == ["short", "long"]


def test_clips_are_the_runtime_s(server, wan_bundle):
    values = {
        "seed": 3,
        "steps": 3,
        "schedule": "native",
        "guidance": 4.0,
        "negative_prompt": "stars",
        "frames": 5,
        **SMALL,
    }
    pixels, report = server.ask("wan", prompt="a red circle", **values)
    alone = Pipeline.open(wan_bundle, backend="cpu")("a red circle", **values)
    assert pixels.shape == (5, 64, 64, 3)
    assert all(close(frame, image) for frame, image in zip(pixels, alone.frames, strict=True))
    assert report["steps"] == 3


def test_what_cannot_be_met_is_said_and_costs_nothing(server):
    from tritonclient.utils import InferenceServerException

    for values, text in [
        ({"schedule": "sometimes"}, "sometimes"),
        ({"height": 63, "width": 64}, "63"),
        ({"priority": "royal"}, "priority"),
        ({"budget": 1.0, "schedule": "native"}, "budget"),
    ]:
        with pytest.raises(InferenceServerException, match=text):
            server.ask("tiny", prompt="a star", **values)
    assert server.ask("tiny", prompt="a star", steps=1, **SMALL)[0].shape == (64, 64, 3)


class FakeTriton(ModuleType):
    """The little of Triton's own module that a model needs."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1

    class TritonModelException(Exception):  # noqa: N818
        """A model that cannot be loaded."""

    class TritonError:
        """An error of a request."""

        class Code(Enum):
            """Triton takes nothing else."""

            INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = range(4)

        INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = Code

        def __init__(self, message: str, code: Code):
            assert isinstance(code, self.Code)
            self.message, self.code = message, code

    def __init__(self) -> None:
        super().__init__("triton_python_backend_utils")

    @staticmethod
    def Tensor(name, values):  # noqa: N802
        return name, values

    @staticmethod
    def InferenceResponse(output_tensors=(), error=None):  # noqa: N802
        return SimpleNamespace(outputs=dict(output_tensors), error=error)

    @staticmethod
    def get_input_tensor_by_name(request, name):
        value = request.values.get(name)
        return None if value is None else SimpleNamespace(as_numpy=lambda: np.array([value], NUMPY.get(type(value))))


NUMPY = {bytes: np.object_, int: np.int64, float: np.float32}


@dataclass
class FakeRequest:
    """A request and its response sender."""

    values: dict[str, object]
    seconds: float = 0.0
    is_cancelled: Callable[[], bool] = lambda: False
    sent: list = field(default_factory=list)

    def timeout(self) -> int:
        return int(self.seconds * 1e6)

    def get_response_sender(self) -> "FakeRequest":
        return self

    def send(self, response, flags):
        self.sent.append(response)

    def answer(self):
        """The one response."""
        end = time.monotonic() + PATIENCE
        while not self.sent:
            assert time.monotonic() < end, "nobody answered"
            time.sleep(0.005)
        (response,) = self.sent
        return response


@pytest.fixture
def model(tiny_bundle):
    """A model over engines that cost nothing, and their backend."""
    pipeline, backend, _ = fake_pipeline(Bundle.open(tiny_bundle))
    made = Model()
    made._triton = FakeTriton()
    made.open(pipeline, in_flight=4, waiting=4)
    backend.calls.clear()
    yield made, backend
    made.finalize()
    assert made.worker.open == 0
    assert made.worker.room.idle


def ask(**values: object) -> FakeRequest:
    return FakeRequest({"prompt": b"a star", "steps": 8, "schedule": b"native", **SMALL, **values})


def test_requests_of_one_and_of_several_calls_share_steps(model):
    made, backend = model
    begin = threading.Event()
    backend.spoil = lambda graph, inputs, outputs: begin.wait(PATIENCE)
    requests = [ask(seed=seed) for seed in range(4)]
    assert made.execute(requests[:2]) == [None, None]
    made.execute(requests[2:3])
    made.execute(requests[3:])
    time.sleep(0.2)
    begin.set()
    assert all(request.answer().outputs["image"].shape == (64, 64, 3) for request in requests)
    assert backend.calls["level-2", 4] >= 6, "of eight steps"


def test_every_request_is_answered_once(model):
    made, backend = model
    code = made._triton.TritonError
    started, go_on = threading.Event(), threading.Event()

    def spoil(graph, inputs, outputs):
        if graph == "level-2":
            started.set()
            go_on.wait(PATIENCE)

    backend.spoil = spoil
    gone = FakeRequest(ask().values, is_cancelled=lambda: True)
    late = FakeRequest(ask().values, seconds=0.001)
    made.execute([first := ask(), gone, bad := ask(prompt=b"\xff"), worse := ask(steps=-1)])
    assert started.wait(PATIENCE)
    assert (bad.answer().error.code, worse.answer().error.code) == (code.INVALID_ARG,) * 2
    assert "UTF-8" in bad.answer().error.message
    assert gone.answer().error.code == code.CANCELLED
    made.execute([late])
    many = [ask(seed=seed) for seed in range(20)]
    made.execute(many)
    refused = [request for request in many if wait_for(request)]
    assert len(refused) >= 12
    assert {request.sent[0].error.code for request in refused} == {code.UNAVAILABLE}
    go_on.set()
    assert late.answer().error.code == code.CANCELLED
    assert "timeout" in late.answer().error.message
    kept = [first, *(request for request in many if request not in refused)]
    assert all(request.answer().error is None for request in kept)
    assert json.loads(first.answer().outputs["report"][0])["steps"] == 8


def wait_for(request: FakeRequest) -> bool:
    """Whether a request is answered soon."""
    end = time.monotonic() + 0.3
    while not request.sent and time.monotonic() < end:
        time.sleep(0.005)
    return bool(request.sent)


def test_an_engine_that_fails_is_an_error_of_the_request(model):
    made, backend = model

    def spoil(graph, inputs, outputs):
        raise BackendError("no more memory")

    backend.spoil = spoil
    made.execute([request := ask()])
    assert request.answer().error.message == "no more memory"
    assert request.answer().error.code == made._triton.TritonError.INTERNAL


def test_a_bundle_that_is_not_there_is_said_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton := FakeTriton())
    parameters = {"bundle": {"string_value": "bundle"}}
    args = {"model_config": json.dumps({"parameters": parameters}), "model_repository": str(tmp_path)}
    with pytest.raises(triton.TritonModelException, match=r"bundle"):
        Model().initialize(args)


def test_a_model_s_folder_is_written_whole_or_not_at_all(tiny_bundle, tmp_path, monkeypatch):
    def write(*options: object):
        return run(main, "triton", tiny_bundle, tmp_path, "--name", "m", *options)

    result = write("--vae-tiling", 100)
    assert (result.exit_code, [*tmp_path.iterdir()]) == (2, [])
    assert write("--threads", 2, "--vae-tiling", 64).exit_code == 0
    before = (tmp_path / "m" / "config.pbtxt").read_text()
    assert 'key: "threads" value: { string_value: "2" }' in before
    assert 'key: "vae_tiling" value: { string_value: "64" }' in before
    assert str(tiny_bundle) in before

    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full)
        result = write("--copy")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "No space left" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m" / "config.pbtxt").read_text() == before
    assert write("--copy").exit_code == 0
    assert Bundle.open(tmp_path / "m" / "bundle").manifest == Bundle.open(tiny_bundle).manifest
    assert 'key: "bundle" value: { string_value: "bundle" }' in (tmp_path / "m" / "config.pbtxt").read_text()


def test_what_is_not_ours_is_not_replaced(tiny_bundle, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.pbtxt").write_text('name: "m"')
    for name in ("m", "../m", ".m", ""):
        result = run(main, "triton", tiny_bundle, tmp_path, "--name", name or " ")
        assert result.exit_code == 2, result.stderr
    assert (tmp_path / "m" / "config.pbtxt").read_text() == 'name: "m"'
