"""scripts/load.py: the three ways to batch, on a clock of their own and on a real server."""

import re

import pytest

import load
from conftest import run
from ddit.runtime import Bundle
from fake_engines import fake_pipeline

REQUESTS = 100


@pytest.mark.parametrize("name", ["equal", "mixed"])
def test_steps_that_are_shared_are_the_best_way_to_batch(tiny_bundle, name):
    found = {}
    for way in ("one at a time", "request level", "step level"):
        pipeline, _, clock = fake_pipeline(Bundle.open(tiny_bundle))
        requests = [{**one, "size": "64x128"} for one in load.requests_of(name, REQUESTS)]
        found[way] = load.load_room(load.rooms(pipeline, clock)[way], way, 16, requests)
        assert len(found[way].latencies) == REQUESTS
    print(f"\n{name}, in simulated time\n\n{load.table([*found.values()])}")
    assert found["step level"].throughput >= 1.3 * found["one at a time"].throughput
    assert found["step level"].throughput >= 0.99 * found["request level"].throughput
    ratio = found["step level"].percentile(99) / found["request level"].percentile(99)
    assert ratio <= (1.0 if name == "mixed" else 1.02), "equal requests that come together are batches anyway"


@pytest.mark.parametrize("through", ["--http", "--no-http"])
def test_three_ways_are_measured(tiny_bundle, tmp_path, through):
    drawing = tmp_path / "load.png"
    options = ("--backend", "cpu", "--clients", 1, "--clients", 2, "--requests", 3, "--rounds", 2, "--plot", drawing)
    result = run(load.main, tiny_bundle, *options, through)
    assert result.exit_code == 0, result.stderr
    rows = re.findall(r"^\| (\d+) \| (\w+ \w+(?: \w+ \w+)?) \| [\d.]+ \| [\d.]+ s \|", result.stdout, re.MULTILINE)
    ways = ["one at a time", "request level", "step level"]
    assert rows == [(clients, way) for clients in ("1", "2") for way in ways]
    assert drawing.read_bytes().startswith(b"\x89PNG")
