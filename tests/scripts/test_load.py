"""scripts/load.py: the three ways to batch, on a clock of their own and on a real server."""

import re
from itertools import islice

import pytest

import load
from conftest import run
from ddit.runtime import Bundle, Request
from ddit.runtime.serving.engine_room import EngineRoom
from ddit.runtime.serving.tickets import Closed, Job
from fake_engines import Clock, fake_pipeline

SIZE = {"height": 128, "width": 64}
REQUESTS = 100


def simulate(room: EngineRoom, clock: Clock, way: str, clients: int, name: str) -> load.Measured:
    """Clients that send their next request when the last one is answered, in simulated time."""
    requests = (
        Request(one["prompt"], one["seed"], one.get("steps"), one["schedule"], **SIZE)
        for one in load.requests_of(name, REQUESTS)
    )
    latencies, begin = [], clock.now
    for request in islice(requests, clients):
        room.accept([Job(room.resolve(request))])
    while not room.idle:
        for event in room.tick():
            if isinstance(event, Closed):
                assert event.result is not None
                latencies.append(event.ticket.closed - event.ticket.arrived)
                if request := next(requests, None):
                    room.accept([Job(room.resolve(request))])
    return load.Measured(way, clients, tuple(latencies), clock.now - begin)


@pytest.mark.parametrize("name", ["equal", "mixed"])
def test_steps_that_are_shared_are_the_best_way_to_batch(tiny_bundle, name):
    found = {}
    for way in ("one at a time", "request level", "step level"):
        pipeline, _, clock = fake_pipeline(Bundle.open(tiny_bundle))
        found[way] = simulate(load.rooms(pipeline, clock)[way], clock, way, 16, name)
        assert len(found[way].latencies) == REQUESTS
    print(f"\n{name}, in simulated time\n\n{load.table([*found.values()])}")
    assert found["step level"].throughput >= 1.3 * found["one at a time"].throughput
    assert found["step level"].throughput >= 0.99 * found["request level"].throughput
    ratio = found["step level"].percentile(99) / found["request level"].percentile(99)
    assert ratio <= (1.0 if name == "mixed" else 1.02), "equal requests that come together are batches anyway"


def test_a_server_is_measured_in_three_ways(tiny_bundle, tmp_path):
    drawing = tmp_path / "load.png"
    options = ("--backend", "cpu", "--clients", 1, "--clients", 2, "--requests", 3, "--rounds", 2, "--plot", drawing)
    result = run(load.main, tiny_bundle, *options)
    assert result.exit_code == 0, result.stderr
    rows = re.findall(r"^\| (\d+) \| (\w+ \w+(?: \w+ \w+)?) \| [\d.]+ \| [\d.]+ s \|", result.stdout, re.MULTILINE)
    ways = ["one at a time", "request level", "step level"]
    assert rows == [(clients, way) for clients in ("1", "2") for way in ways]
    assert drawing.read_bytes().startswith(b"\x89PNG")
