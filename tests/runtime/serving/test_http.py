"""The HTTP server, with OpenAI's own client and with whatever else comes along."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx2 as httpx
import numpy as np
import openai
import pytest
from PIL import Image

from ddit.runtime import Pipeline
from ddit.runtime.serving import server as server_module
from ddit.runtime.serving.schema import Limits
from ddit.runtime.session import StepError
from served import Served, serving

SIZE = "64x128"
SMALL = {"width": 64, "height": 128}
GENERATE = "/v1/images/generations"


@pytest.fixture(scope="module")
def served_pipeline(tiny_bundle) -> Pipeline:
    return Pipeline.open(tiny_bundle, backend="cpu")


@pytest.fixture(scope="module")
def server(served_pipeline) -> Iterator[Served]:
    with serving(served_pipeline, limits=Limits(prompt=200, steps=60, body=20_000, body_seconds=1.0)) as served:
        yield served


def client(server: Served, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, **options)


def picture(b64_json: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def ask(server: Served, **values) -> httpx.Response:
    return httpx.post(server.url + GENERATE, json={"prompt": "a red circle", "size": SIZE, **values}, timeout=60)


def events(server: Served, **values) -> list[dict]:
    body = {"prompt": "a red circle", "size": SIZE, "stream": True, **values}
    with httpx.stream("POST", server.url + GENERATE, json=body, timeout=60) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = "".join(response.iter_text()).split("\n\n")
    found = []
    for block in filter(None, blocks):
        event, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert event == f"event: {found[-1]['type']}"
    return found


def eventually(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_openai_s_client_gets_the_pipeline_s_pictures(server, served_pipeline):
    found = client(server).images.generate(
        model="tiny",
        prompt="a red circle",
        n=2,
        size=SIZE,
        response_format="b64_json",
        user="somebody",
        extra_body={"seed": 7, "steps": 6, "schedule": "dynamic", "reuse": "adaptive:0.1"},
    )
    assert (found.size, found.output_format, len(found.data)) == (SIZE, "png", 2)
    for number, image in enumerate(found.data):
        alone = served_pipeline("a red circle", seed=7 + number, steps=6, schedule="dynamic+adaptive:0.1", **SMALL)
        difference = np.asarray(picture(image.b64_json), np.int16) - np.asarray(alone.image, np.int16)
        assert np.abs(difference).max() <= 1
        assert image.ddit["seed"] == 7 + number
        assert image.ddit["steps"] == 6
    assert found.usage.output_tokens == 2 * 4 * 8
    assert found.usage.input_tokens == 2 * served_pipeline.bundle.manifest.text_length


def test_openai_s_client_streams(server, served_pipeline):
    stream = client(server).images.generate(
        prompt="a red circle",
        size=SIZE,
        stream=True,
        partial_images=2,
        output_format="webp",
        extra_body={"seed": 3, "steps": 6, "schedule": "native"},
    )
    found = list(stream)
    kinds = [event.type for event in found]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in found[:2]] == [0, 1]
    for event in found:
        assert picture(event.b64_json).format == "WEBP"
        assert picture(event.b64_json).size == (64, 128)
        assert (event.size, event.output_format) == (SIZE, "webp")
    assert found[-1].usage.output_tokens == 4 * 8


def test_openai_s_client_lists_the_models(server):
    (model,) = client(server).models.list().data
    assert [level["patch"] for level in model.ddit["levels"]] == [2, 4, 8]
    assert client(server).models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError):
        client(server).models.retrieve("other/one")


def test_openai_s_client_understands_the_errors(server):
    with pytest.raises(openai.BadRequestError, match="multiple of 64") as error:
        client(server).images.generate(prompt="a red circle", size="100x100")
    assert error.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as error:
        client(server).images.generate(prompt="a red circle", extra_body={"stepz": 3})
    assert (error.value.code, error.value.param) == ("unknown_parameter", "stepz")


def test_progress_tells_of_every_step(server):
    found = events(server, seed=5, schedule="fixed:2x4,4x3,8x2", progress=True, trace=True)
    assert found[0] == {"type": "ddit.accepted", "index": 0, "seed": 5, "size": SIZE, "steps": 9,
                        "schedule": "fixed:2x4,4x3,8x2"}  # fmt: skip
    steps = [event for event in found if event["type"] == "ddit.progress"]
    assert [event["step"] for event in steps] == list(range(1, 10))
    assert [event["level"] for event in steps] == [2] * 4 + [4] * 3 + [8] * 2
    assert all(event["scale"] == 1 for event in steps)
    last = steps[-1]
    assert picture(last["preview"]).size == (8, 16), "a pixel for every latent pixel"
    assert found[-1]["type"] == "image_generation.completed"
    assert found[-1]["ddit"]["steps_per_level"] == {"2": 4, "4": 3, "8": 2}
    assert [step["level"] for step in found[-1]["trace"]["steps"]] == [2] * 4 + [4] * 3 + [8] * 2


def test_a_seed_is_chosen_where_none_is_given_and_makes_the_picture_again(server):
    first = ask(server, steps=2).json()["data"][0]
    again = ask(server, steps=2, seed=first["ddit"]["seed"]).json()["data"][0]
    assert again["b64_json"] == first["b64_json"]
    assert ask(server, steps=2).json()["data"][0]["ddit"]["seed"] != first["ddit"]["seed"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a " * 101}, "202 characters; at most 200"),
        ({"prompt": 3}, "prompt"),
        ({"n": 11}, "n:"),
        ({"n": 0}, "n:"),
        ({"size": "64"}, "size:"),
        ({"size": "64x100"}, "not a multiple"),
        ({"size": "8192x8192"}, "outside the bundle's profile"),
        ({"steps": 61}, "at most 60"),
        ({"schedule": "fixed:2x61"}, "at most 60"),
        ({"schedule": "sometimes"}, "unknown schedule"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**60}, "seed"),
        ({"guidance": "NaN"}, "guidance"),
        ({"budget": 1, "schedule": "native"}, "budget"),
        ({"budget": 1, "n": 2, "steps": 0}, "steps"),
        ({"response_format": "url"}, "response_format"),
        ({"background": "transparent"}, "background"),
        ({"model": "gpt-image-1"}, "there is no model"),
        ({"partial_images": 2}, "for streams"),
        ({"negative_prompt": "stars"}, "negative prompt"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(server, values, message):
    response = ask(server, **values)
    error = response.json()["error"]
    assert response.status_code == 400
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[" * 10_000, 400),
        (b'{"prompt": "\xff"}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "a", "steps": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": "a", "guidance": NaN}', 400),
        (b'{"prompt": "a", "guidance": 1e999}', 400),
        (b'"' + b"a" * 30_000 + b'"', 413),
    ],
)
def test_bodies_that_are_none(server, body, status):
    response = httpx.post(server.url + GENERATE, content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_a_body_without_end_is_refused(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = f"POST {GENERATE} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        sent = 0
        with suppress(ConnectionError):
            while sent < 10_000_000:
                sent += connection.send(b"3e8\r\n" + b" " * 1000 + b"\r\n")
        assert sent < 10_000_000, "the server closes"


def test_a_body_that_does_not_come_is_not_waited_for(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        head = f"POST {GENERATE} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{{"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_head_that_does_not_come_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.3)
    for first in (b"", b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            if first:
                connection.sendall(first)
                answer = b""
                while not answer.endswith(b'{"status":"ok"}'):
                    answer += connection.recv(1000)
            connection.sendall(b"GET /healthz HTTP/1.1\r\nx-slow: ")
            begin = time.monotonic()
            assert connection.recv(100) == b"", "the server closes"
            assert time.monotonic() - begin < 5


def test_unknown_paths_and_methods(server):
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    response = httpx.get(server.url + GENERATE)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")


@pytest.fixture
def slow(server, monkeypatch):
    """Steps that take a while on any machine."""
    session = server.worker.room.session
    advance = session.advance

    def later(members):
        time.sleep(0.02)
        advance(members)

    monkeypatch.setattr(session, "advance", later)


def test_a_client_that_goes_gives_its_place_back(server, slow):
    cancelled = server.metric('ddit_pictures_total{outcome="cancelled"}')
    body = {"prompt": "a red circle", "size": "256x256", "steps": 60, "schedule": "native", "n": 3}
    for stream in (False, True):
        asked = {"json": {**body, "stream": stream}, "timeout": 0.3}
        with pytest.raises(httpx.ReadTimeout), httpx.stream("POST", server.url + GENERATE, **asked) as response:
            response.read()
        assert eventually(lambda: server.worker.open == 0 and server.worker.room.idle)
    assert server.metric('ddit_pictures_total{outcome="cancelled"}') == cancelled + 6


def test_more_than_may_wait_is_refused_with_a_time_to_come_again(server, slow):
    done = []
    long = {"prompt": "a red circle", "size": "256x256", "steps": 60, "schedule": "native", "n": 6}
    threads = [threading.Thread(target=lambda: done.append(ask(server, **long).status_code)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert eventually(lambda: server.worker.open == 12)
    refused = ask(server, steps=1)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    for thread in threads:
        thread.join()
    assert done == [200, 200]
    assert ask(server, steps=1).status_code == 200


def test_a_request_s_own_deadline(server, slow):
    response = ask(server, size="256x256", steps=60, schedule="native", timeout=0.1)
    assert response.status_code == 408
    assert response.headers["x-should-retry"] == "false"
    assert response.json()["error"]["code"] == "timeout"
    long = {"steps": 60, "schedule": "native", "timeout": 0.05}
    with pytest.raises(openai.APIError, match="longer than"):
        list(client(server).images.generate(prompt="a", size="256x256", stream=True, extra_body=long))


def test_figures(server):
    before = {level: server.metric(f'ddit_steps_total{{level="{level}"}}') for level in ("2", "4", "predicted")}
    ask(server, steps=9, schedule="fixed:2x3,4x6")
    assert server.metric('ddit_steps_total{level="2"}') == before["2"] + 3
    assert server.metric('ddit_steps_total{level="4"}') == before["4"] + 6
    assert 0 < server.metric("ddit_coarse_share") < 1
    assert server.metric("ddit_waiting") == server.metric("ddit_in_flight") == 0
    for name in ("queue_seconds", "picture_seconds", "own_seconds", 'batch_fill_count{work="step"}'):
        assert server.metric(f"ddit_{name}" if "{" in name else f"ddit_{name}_count") > 0


def test_health(server):
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/readyz").json() == {"status": "ok"}


def test_the_page_s_files_come_with_a_policy_and_nothing_beside_them(server):
    for path in ("/", "/page/index.html"):
        response = httpx.get(server.url + path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/html")
        assert response.headers["content-security-policy"].startswith("default-src 'self'")
    assert httpx.get(f"{server.url}/page/../engine_room.py").status_code == 404
    assert httpx.get(f"{server.url}/page/%2e%2e/engine_room.py").status_code == 404


def test_a_key(served_pipeline):
    with serving(served_pipeline, token="secret") as server:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            assert httpx.get(server.url + path).status_code == 401
            wrong = httpx.get(server.url + path, headers={"authorization": "Bearer secres"})
            assert wrong.status_code == 401
            assert wrong.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{server.url}/v1/models", headers={"authorization": "bearer secret"}).status_code == 200
        for path in ("/healthz", "/readyz", "/", "/page/index.html"):
            assert httpx.get(server.url + path).status_code == 200
        assert ask(server).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            client(server).models.list()
        assert client(server).with_options(api_key="secret").models.list().data


def test_engines_that_fail_again_and_again_make_the_server_unhealthy(served_pipeline, monkeypatch):
    with serving(served_pipeline) as server:

        def advance(members):
            raise StepError("no more memory", [sample for sample, _ in members])

        monkeypatch.setattr(server.worker.room.session, "advance", advance)
        for _ in range(3):
            response = ask(server, steps=2)
            assert response.status_code == 500
            assert response.json()["error"]["message"] == "no more memory"
        assert httpx.get(f"{server.url}/healthz").status_code == 503
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        assert ask(server, steps=2).status_code == 503


def test_a_room_that_breaks_tells_everybody(served_pipeline, monkeypatch):
    with serving(served_pipeline) as server:

        def tick():
            raise RuntimeError("a mistake of ours")

        monkeypatch.setattr(server.worker.room, "tick", tick)
        assert ask(server, steps=2).status_code == 500
        assert ask(server, steps=2).status_code == 503
        assert "a mistake of ours" in httpx.get(f"{server.url}/healthz").json()["status"]
        server.worker.room.cancel(next(iter(server.worker.room._open)))


def test_the_command_drains_on_sigterm_and_logs_no_prompt(tiny_bundle):
    command = [sys.executable, "-m", "ddit.runtime.cli", "serve", tiny_bundle, "--port", "0", "--backend", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "DDIT_API_KEY": "key"})
    lines = [process.stderr.readline()]
    url = lines[0].split()[0]
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))
    reader.start()

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    try:
        assert eventually(ready, 60)
        answers = []
        body = {"prompt": "a secret zebra " * 20, "size": "256x256", "steps": 60, "schedule": "native", "n": 4}

        def post() -> None:
            headers = {"authorization": "Bearer key"}
            answers.append(httpx.post(url + GENERATE, json=body, headers=headers, timeout=60))

        asking = threading.Thread(target=post)
        asking.start()
        waiting = lambda: httpx.get(f"{url}/metrics", headers={"authorization": "Bearer key"}).text  # noqa: E731
        assert eventually(lambda: "ddit_in_flight 4.0" in waiting())
        process.send_signal(signal.SIGTERM)
        asking.join(60)
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        reader.join()
    assert [answer.status_code for answer in answers] == [200]
    assert len(answers[0].json()["data"]) == 4
    assert any(f"POST {GENERATE} 200" in line for line in lines)
    assert "zebra" not in "".join(lines)
    assert "Traceback" not in "".join(lines)


def test_our_own_description_is_complete(server):
    description = httpx.get(f"{server.url}/openapi.json").json()
    assert {GENERATE, "/v1/models", "/healthz", "/readyz", "/metrics"} <= set(description["paths"])
    responses = description["paths"][GENERATE]["post"]["responses"]
    assert {"200", "400", "401", "408", "413", "429", "500", "503"} == set(responses)
