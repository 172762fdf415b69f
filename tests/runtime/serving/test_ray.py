"""Bundles on a Ray cluster of this machine: the same API, and nothing that was accepted is lost with a replica."""

import base64
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import numpy as np
import openai
import pytest
from PIL import Image

from conftest import run
from ddit.runtime import Pipeline
from ddit.runtime.cli import main

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'ddit[ray]'")
pytestmark = pytest.mark.xdist_group("ray")  # one cluster for all of them

LONG = {"prompt": "a", "steps": 100, "schedule": "native", "size": "256x256", "n": 10}  # seconds
KEY = "a key"
HEADERS = {"authorization": f"Bearer {KEY}"}
COMMAND = (sys.executable, "-c", "from ddit.runtime.cli import main; main()")
PATIENCE = 60  # seconds
CLIENT = httpx.Client(timeout=PATIENCE, limits=httpx.Limits(max_connections=None))


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster's address; the commands find it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    context = ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    address = context.address_info["gcs_address"]
    os.environ["RAY_ADDRESS"] = address
    yield address
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()


@dataclass
class Served:
    url: str
    process: subprocess.Popen
    log: Path

    def post(self, **body) -> httpx.Response:
        return CLIENT.post(f"{self.url}/v1/images/generations", json=body, headers=HEADERS)

    def figures(self) -> Counter[str]:
        """The sums of all replicas' figures, by name and labels other than theirs."""
        from prometheus_client.parser import text_string_to_metric_families

        sums: Counter[str] = Counter()
        text = httpx.get(f"{self.url}/metrics", headers=HEADERS, timeout=PATIENCE).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                own = [f"{key}={value}" for key, value in sample.labels.items() if key not in ("model", "replica")]
                sums[" ".join([sample.name, *sorted(own)])] += sample.value
        return sums


@pytest.fixture(scope="module")
def other_bundle(tiny_bundle, tmp_path_factory) -> Path:
    """The same under another model's name."""
    other = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("other") / "other.bundle")
    manifest = json.loads((other / "bundle.json").read_text())
    manifest["model"]["id"] = "other"
    (other / "bundle.json").write_text(json.dumps(manifest))
    return other


@pytest.fixture(scope="module")
def served(cluster, tiny_bundle, other_bundle, tmp_path_factory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("served") / "log"
    options = ("--ray", "--replicas", "2", "--backend", "cpu", "--threads", "1", "--in-flight", "8", "--port", "0")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*COMMAND, "serve", str(tiny_bundle), str(other_bundle), *options],
            stderr=stderr, env={**os.environ, "DDIT_API_KEY": KEY},
        )  # fmt: skip
        try:
            until = time.monotonic() + PATIENCE
            while "serves" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.05)
            url = log.read_text().split()[0]
            while httpx.get(f"{url}/readyz").status_code != 200:
                assert time.monotonic() < until
                time.sleep(0.05)
            yield Served(url, process, log)
        finally:
            process.terminate()
            process.wait(PATIENCE)


@pytest.fixture(scope="module")
def alone(tiny_bundle) -> Pipeline:
    return Pipeline.open(tiny_bundle, backend="cpu", threads=1)


def check_pictures(alone: Pipeline, found: list[tuple[str, int, str]], steps: int) -> None:
    """Compare pictures in base64, with their prompts and seeds, with those that are made without a server."""
    for first in range(0, len(found), 4):
        some = found[first : first + 4]
        prompts, seeds, pictures = zip(*some, strict=True)
        made = alone.batch(prompts, seeds=seeds, steps=steps, schedule="native", height=64, width=64)
        for text, result in zip(pictures, made, strict=True):
            with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
                assert np.abs(np.asarray(picture, float) - np.asarray(result.image, float)).max() <= 1


def events(response: httpx.Response) -> list[dict]:
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]


def replicas_of(name: str) -> list[int]:
    """The process ids of an application's replicas on this machine, below this process's cluster."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if f"ServeReplica:{name}:engines".encode() in title and is_below(int(folder.name), os.getpid()):
            found.append(int(folder.name))
    return found


def is_below(process: int, ancestor: int) -> bool:
    while process > 1:
        if process == ancestor:
            return True
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def test_a_replica_refuses_engines_that_do_not_work(cluster, tiny_bundle, tmp_path):
    broken = shutil.copytree(tiny_bundle, tmp_path / "broken.bundle")
    graph = broken / "level-4.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    result = subprocess.run(
        [*COMMAND, "serve", str(broken), "--ray", "--backend", "cpu", "--port", "0"],
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert result.returncode == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: a replica did not start: ")
    assert "level-4" in error


def test_models_by_name(served):
    found = httpx.get(f"{served.url}/v1/models", headers=HEADERS).json()["data"]
    assert [(one["id"], one["ddit"]["backend"]) for one in found] == [("tiny", "cpu"), ("other", "cpu")]
    before = served.figures()["ddit_pictures_total outcome=finished"]
    for model in (None, "tiny", "other"):
        response = served.post(prompt="a red circle", size="64x64", steps=2, seed=1, model=model)
        assert response.status_code == 200, response.text
    assert served.figures()["ddit_pictures_total outcome=finished"] == before + 3
    assert served.post(prompt="a", model="none").status_code == 400


def test_errors_are_the_same_as_without_ray(served):
    url = f"{served.url}/v1/images/generations"
    assert httpx.post(url, json={"prompt": "a"}).status_code == 401
    assert served.post(prompt="a", schedule="sometimes").json()["error"]["message"].startswith("unknown schedule")
    assert served.post(prompt="a", steps=101).status_code == 400
    assert served.post(prompt="a", seed=-1).status_code == 400
    slow = served.post(**LONG, timeout=0.2)
    assert slow.status_code == 408
    assert slow.json()["error"]["code"] == "timeout"


def test_the_official_client_streams(served, alone):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY)
    extra = {"steps": 6, "schedule": "native", "seed": 3}
    stream = client.images.generate(prompt="a star", size="64x64", stream=True, partial_images=1, extra_body=extra)
    found = list(stream)
    assert [one.type for one in found] == ["image_generation.partial_image", "image_generation.completed"]
    check_pictures(alone, [("a star", 3, found[1].b64_json)], 6)


def test_a_client_that_goes_frees_its_place(served):
    before = served.figures()["ddit_pictures_total outcome=cancelled"]
    body = {**LONG, "stream": True, "progress": True}
    with httpx.stream("POST", f"{served.url}/v1/images/generations", json=body, headers=HEADERS) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{served.url}/v1/images/generations", json=LONG, headers=HEADERS, timeout=0.3)
    until = time.monotonic() + PATIENCE
    while served.figures()["ddit_pictures_total outcome=cancelled"] < before + 20:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert served.figures()["ddit_in_flight"] == 0


def test_a_replica_is_killed_under_64_clients(served, alone):
    """Nothing that was accepted is lost or answered twice, and every picture is its seed's."""
    clients, each, steps = 64, 2, 60
    answers: list[tuple[dict, httpx.Response]] = []
    failures: list[Exception] = []
    enough = threading.Event()

    def ask(client: int) -> None:
        random_ = random.Random(client)
        for number in range(each):
            body = {"prompt": random_.choice(("a red circle", "a blue square", "two stars")), "size": "64x64",
                    "steps": steps, "schedule": "native"}  # fmt: skip
            if number % 2:
                body["seed"] = 1000 * client + number
            if client % 4 == 1:
                body |= {"stream": True, "progress": True}
            try:
                answers.append((body, served.post(**body)))
            except Exception as error:
                failures.append(error)
            if len(answers) >= clients // 2:
                enough.set()

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    assert enough.wait(PATIENCE)
    victim, other = replicas_of("ddit-engines-1")
    os.kill(victim, signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert Counter(response.status_code for _, response in answers) == {200: clients * each}
    pictures = []
    for body, response in answers:
        if body.get("stream"):
            told = events(response)
            kinds = Counter(one["type"] for one in told)
            assert kinds == {"ddit.accepted": 1, "ddit.progress": steps, "image_generation.completed": 1}
            assert [one["step"] for one in told if one["type"] == "ddit.progress"] == [*range(1, steps + 1)]
            seed, made = told[0]["seed"], told[-1]
        else:
            (made,) = response.json()["data"]
            seed = made["ddit"]["seed"]
        assert seed == body.get("seed", seed) == made["ddit"]["seed"]
        pictures.append((body["prompt"], seed, made["b64_json"]))
    check_pictures(alone, pictures, steps)
    assert served.figures()["ddit_retried_total"] > 0, "the kill met nobody"
    assert other in replicas_of("ddit-engines-1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", "b"], "one process serves one bundle"),
        (["a", "--replicas", "2"], "one process serves one bundle"),
        (["a", "a", "--ray"], "two bundles are of one model"),
        (["a", "--ray", "--replicas", "9", "--backend", "cpu"], "the Ray cluster has 8"),
        (["a", "--ray", "--backend", "cuda"], "the Ray cluster has 0"),
        (["clips", "--ray"], "served by one process"),
        (["a", "--ray", "--backend", "cpu"], "this Ray cluster serves bundles already"),
    ],
)
def test_what_cannot_be_served(served, tiny_bundle, wan_bundle, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    for name, bundle in (("a", tiny_bundle), ("b", tiny_bundle), ("clips", wan_bundle)):
        (tmp_path / name).symlink_to(bundle)
    result = run(main, "serve", *arguments, "--port", "0")
    assert result.exit_code == 2
    assert words in result.stderr


def test_sigterm_lets_what_was_accepted_finish(served):
    """The last of the server's tests."""
    body = {**LONG, "n": 4, "stream": True, "progress": True}
    with httpx.stream("POST", f"{served.url}/v1/images/generations", json=body, headers=HEADERS,
                      timeout=PATIENCE) as response:  # fmt: skip
        lines = response.iter_lines()
        next(lines)
        served.process.terminate()
        told = [line for line in lines if line == "event: image_generation.completed"]
    assert len(told) == 4
    assert served.process.wait(PATIENCE) == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{served.url}/healthz")


def test_lines_are_spread_and_a_dead_process_s_are_made_by_others(cluster, tiny_bundle, tmp_path, alone):
    lines = [{"prompt": "a red circle", "seed": seed} for seed in range(60)]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--steps", 30, "--schedule", "native", "--height", 64, "--width", 64, "--in-flight", 4, "--threads", 1)
    killed = []

    def kill() -> None:
        until = time.monotonic() + PATIENCE
        while len(files := [*out.glob(".results-*.jsonl")]) < 2 and time.monotonic() < until:
            time.sleep(0.005)
        killed.append(int(files[0].stem.rpartition("-")[2]))
        while not files[0].stat().st_size:
            time.sleep(0.005)
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    result = run(main, "generate", tiny_bundle, "--prompts", prompts, "--out", out, "--ray", "--replicas", 2,
                 "--backend", "cpu", *options)  # fmt: skip
    killer.join()
    assert result.exit_code == 0, result.stderr
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [one["seed"] for one in records] == [*range(60)]
    assert not [*out.glob(".*")]
    for one in records[::10]:
        made = alone("a red circle", seed=one["seed"], steps=30, schedule="native", height=64, width=64).image
        with Image.open(out / one["file"]) as picture:
            assert np.abs(np.asarray(picture, float) - np.asarray(made, float)).max() <= 1


def test_a_killed_run_on_ray_goes_on(cluster, tiny_bundle, tmp_path):
    lines = [{"prompt": "a red circle", "seed": seed} for seed in range(80)]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--steps", "30", "--schedule", "native", "--height", "64", "--width", "64", "--backend", "cpu")
    command = [*COMMAND, "generate", str(tiny_bundle), "--prompts", str(prompts), "--out", str(out), "--ray",
               "--threads", "1", *options]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + PATIENCE
        while sum(file.read_bytes().count(b"\n") for file in out.glob(".results-*.jsonl")) < 10:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    maker = int(next(out.glob(".results-*.jsonl")).stem.rpartition("-")[2])
    while Path(f"/proc/{maker}").exists():  # Ray ends the processes of a driver that is gone
        assert time.monotonic() < until
        time.sleep(0.02)
    finished = [json.loads(line)["file"] for file in out.glob(".results-*.jsonl")
                for line in file.read_bytes().split(b"\n")[:-1]]  # fmt: skip
    before = {file: (out / file).stat().st_mtime_ns for file in finished}
    assert 10 <= len(before) < 80
    result = run(main, "generate", tiny_bundle, "--prompts", prompts, "--out", out, "--json", *options)
    assert json.loads(result.stdout) == {"out": str(out), "made": 80 - len(before), "kept": len(before), "failed": 0}
    assert all((out / file).stat().st_mtime_ns == when for file, when in before.items())
    assert len((out / "results.jsonl").read_text().splitlines()) == 80


def test_a_bundle_that_does_not_run_ends_the_batch_too(cluster, tiny_bundle, tmp_path):
    broken = shutil.copytree(tiny_bundle, tmp_path / "broken.bundle")
    graph = broken / "level-2.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    options = ("--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out", "--backend", "cpu", "--ray")
    result = run(main, "generate", broken, *options)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: a process failed: ")
    assert "level-2.onnx" in result.stderr.splitlines()[-1]
