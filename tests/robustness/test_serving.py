"""Requests of any kind to the HTTP server: no answer is a server's failure, and afterwards everything is as before.

    pytest tests/robustness/test_serving.py --thorough

sends 10,000. The engines are fakes that cost nothing; everything before them is the real server.
"""

import gc
import http.client
import json
import socket
import struct
import threading
import time
from collections import Counter
from pathlib import Path

import httpx2 as httpx
import pytest
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ddit.runtime import Bundle
from ddit.runtime.serving.schema import Limits
from fake_engines import fake_pipeline
from outcomes import count
from served import Served, serving

GENERATE = "/v1/images/generations"
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
PATIENCE = 10.0  # seconds for a connection to be answered or closed


@pytest.fixture(scope="module")
def server(tiny_bundle):
    pipeline, _, _ = fake_pipeline(Bundle.open(tiny_bundle))
    limits = Limits(body=20_000, body_seconds=0.3, steps=60, seconds=5.0)
    with serving(pipeline, in_flight=8, waiting=32, limits=limits) as served:
        yield served


def attack(url, operation, examples, *, wrong):
    """Send requests that the description allows, and with ``wrong`` as many that it does not."""
    modes = [schemathesis.GenerationMode.POSITIVE, *([schemathesis.GenerationMode.NEGATIVE] if wrong else [])]
    for mode in modes:

        @examples
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case):
            response = case.call(base_url=url, timeout=PATIENCE)
            case.validate_response(response, checks=CHECKS)
            count(f"HTTP: {operation.method.upper()} {operation.path}", outcome(response.status_code))

        send()


def test_requests_made_from_our_own_description(server, examples):
    description = httpx.get(f"{server.url}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(description)
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) == 6

    for operation in operations:
        takes = operation.path == GENERATE  # the others take nothing that could be wrong
        attack(server.url, operation, examples(*((60, 3000) if takes else (5, 100))), wrong=takes)
    settled(server)


def test_requests_for_clips_made_from_the_description(wan_bundle, examples):
    pipeline, _, _ = fake_pipeline(Bundle.open(wan_bundle))
    limits = Limits(body=20_000, body_seconds=0.3, steps=20, pixels=64 * 64, seconds=1.0)
    with serving(pipeline, in_flight=8, waiting=32, limits=limits) as served:
        description = httpx.get(f"{served.url}/openapi.json").json()
        schema = schemathesis.openapi.from_dict(description)
        found = [operation.ok() for operation in schema.get_all_operations()]
        operations = [operation for operation in found if operation.path.startswith("/v1/videos")]
        assert len(operations) == 5

        for operation in operations:
            takes = operation.method == "post"
            attack(served.url, operation, examples(*((40, 1000) if takes else (5, 100))), wrong=takes)


HEADS = st.sampled_from(
    [b"POST " + GENERATE.encode(), b"GET /v1/models", b"GET /", b"BREW /pot", b"POST *", b"\x16\x03\x01"]
)
HEADER = st.one_of(
    st.sampled_from([
        *(b"content-length: 10", b"content-length: -1", b"content-length: " + b"9" * 20, b"content-length: 0x5"),
        *(b"transfer-encoding: chunked", b"transfer-encoding: gzip", b"expect: 100-continue", b"connection: upgrade"),
        *(b"content-type: application/json", b"content-type: \xff\xff", b"authorization: Bearer \xff", b"host:"),
        b"x: " + b"a" * 100_000,
    ]),
    st.binary(max_size=50),
)  # fmt: skip
USUAL = {"prompt": "a red circle", "size": "64x64", "steps": 30}
BODY = st.one_of(
    st.binary(max_size=300),
    st.sampled_from([b"", b"{", b"[" * 15_000, b"0\r\n\r\n", b"ffffffff\r\n", b" " * 30_000]),
    st.fixed_dictionaries(
        {}, optional={"n": st.integers(1, 10), "stream": st.booleans(), "progress": st.booleans()}
    ).map(lambda values: json.dumps({**USUAL, **values}).encode()),
)


@st.composite
def bytes_of_requests(draw) -> bytes:
    """What may look like a request, or like several."""
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        body = draw(BODY)
        headers = [b"host: x", *draw(st.lists(HEADER, max_size=4))]
        if draw(st.booleans()):
            headers += [b"content-type: application/json", b"content-length: %d" % len(body)]
        parts += [draw(HEADS) + b" HTTP/1.1\r\n" + b"\r\n".join(headers) + b"\r\n\r\n" + body]
    return b"".join(parts)


ENDS = st.sampled_from(["wait", "half", "close", "reset"])


def test_bytes_of_any_kind_and_clients_that_go(server, examples):
    @examples(60, 4000)
    @given(sent=bytes_of_requests(), end=ENDS, seconds=st.sampled_from([0.0, 0.0, 0.005, 0.02]))
    def send(sent, end, seconds):
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
            answer = b""
            try:
                connection.sendall(sent)
                if end in ("wait", "half"):
                    if end == "half":
                        connection.shutdown(socket.SHUT_WR)
                    connection.settimeout(1.0 if end == "wait" else PATIENCE)
                    while part := connection.recv(65_536):
                        answer += part
                else:
                    time.sleep(seconds)
            except TimeoutError:
                assert end == "wait", "the server keeps a connection open that nobody writes to"
            except OSError:  # it closed before we were done
                pass
            if end == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if answer.startswith(b"HTTP/1.1 "):
            status = int(answer[9:12])
            assert status < 500, answer[:300]
            count("HTTP: bytes", outcome(status))
        else:
            count("HTTP: bytes", "no answer")

    send()
    settled(server)


def test_many_slow_clients_at_once_leave_room_for_others(server):
    """They send nothing, half a head, or half a body."""
    head = f"POST {GENERATE} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
    slow = [b"", head[:40].encode(), head.encode() + b'{"prompt"']
    connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(150)]
    try:
        for number, connection in enumerate(connections):
            connection.sendall(slow[number % 3])
        assert httpx.post(server.url + GENERATE, json=USUAL, timeout=PATIENCE).status_code == 200
    finally:
        for connection in connections:
            connection.close()
    settled(server)


def test_the_server_s_memory_does_not_grow(server, pytestconfig):
    """Pictures, refusals and clients that go, again and again."""
    rounds = 40 if pytestconfig.getoption("--thorough") else 6

    def one_round() -> None:
        threads = [threading.Thread(target=mixture) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        settled(server)

    def mixture() -> None:
        for number in range(10):
            body = {**USUAL, "n": 1 + number % 3, "stream": number % 2 == 1, "progress": number % 2 == 1}
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
            connection.request("POST", GENERATE, json.dumps(body), {"content-type": "application/json"})
            if number % 5:
                connection.getresponse().read()
            connection.close()

    one_round()
    one_round()
    before, objects = resident_bytes(), Counter(type(one).__name__ for one in gc.get_objects())
    for _ in range(rounds):
        one_round()
    gc.collect()
    after = Counter(type(one).__name__ for one in gc.get_objects())
    grown = {name: (objects[name], after[name]) for name in after if after[name] > 1.2 * objects[name] + 200}
    assert not grown
    megabytes = (resident_bytes() - before) / 1e6
    print(f"memory grew by {megabytes:.1f} MB in {rounds} rounds of 40 requests")
    assert megabytes < 30


def outcome(status: int) -> str:
    """The name that the report has for it."""
    return "ran" if status < 400 else "refused"


def resident_bytes() -> int:
    """Of this process, which the server shares."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def settled(server: Served) -> None:
    """Nothing is left of the requests before, and the server makes pictures."""
    end = time.monotonic() + PATIENCE
    while server.worker.open or not server.worker.room.idle:
        assert time.monotonic() < end, "a place is still taken"
        time.sleep(0.01)
    assert not server.worker.broken
    assert not server.worker._orders
    assert not server.worker.room.session.samples
    assert httpx.post(server.url + GENERATE, json=USUAL, timeout=PATIENCE).status_code == 200
