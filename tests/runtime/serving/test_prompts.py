"""Prompts are encoded once, whoever asks for them, and what is kept of them has a bound."""

from collections.abc import Iterator

import numpy as np
import pytest

from ddit.runtime import Bundle, Pipeline, Request
from ddit.runtime.bundle.names import NEGATIVE
from ddit.runtime.serving.engine_room import EngineRoom
from ddit.runtime.serving.prompts import EncodedPrompts
from ddit.runtime.serving.tickets import Closed, Job
from fake_engines import FakeBackend, fake_pipeline

SMALL = {"height": 64, "width": 64}


def rows(backend: FakeBackend, graph: str = "t5") -> int:
    """Prompts that were encoded so far."""
    return sum(count * batch for (name, batch), count in backend.calls.items() if name == graph)


def ends(room: EngineRoom, requests: list[Request]) -> Iterator[Closed]:
    """The ends of requests, in their order."""
    tickets, found = room.accept([Job(room.resolve(request)) for request in requests]), {}
    while not room.idle:
        found |= {event.ticket: event for event in room.tick() if isinstance(event, Closed)}
    return (found[ticket] for ticket in tickets)


def test_pictures_of_one_prompt_encode_it_once(tiny_bundle):
    pipeline, backend, clock = fake_pipeline(Bundle.open(tiny_bundle))
    room = EngineRoom(pipeline, in_flight=3, clock=clock)  # in several batches
    several = [Request("a red circle", seed, 2, "native", **SMALL) for seed in range(10)]
    assert all(end.result for end in ends(room, several))
    assert (rows(backend), rows(backend, "clip")) == (1, 1)
    assert all(end.result for end in ends(room, [*several[:2], Request("a star", 0, 2, "native", **SMALL)]))
    assert (rows(backend), rows(backend, "clip")) == (2, 2)
    assert next(ends(room, [Request("a star", 0, 2, "native", text_length=17, **SMALL)])).result
    assert rows(backend) == 3, "of another length"


def test_pictures_are_the_same(tiny_bundle):
    pipeline = Pipeline.open(tiny_bundle, backend="cpu")
    requests = [Request(prompt, seed, 4, "native", **SMALL) for prompt in ("a star", "a moon") for seed in range(3)]
    for end, request in zip(ends(EngineRoom(pipeline), requests), requests, strict=True):
        latent = pipeline.run([request])[0].latent
        np.testing.assert_allclose(end.result.latent, latent, atol=1e-5 * np.abs(latent).max())


def test_negative_prompts_are_encoded_once_too(wan_bundle):
    pipeline, calls = Pipeline.open(wan_bundle, backend="cpu"), []
    encode = pipeline.encode
    pipeline.encode = lambda prompts, length: calls.append([*prompts]) or encode(prompts, length)
    text = {"guidance": 4.0, "negative_prompt": "stars", "frames": 1, **SMALL}
    runs = [pipeline.resolve([Request(prompt, **text)])[0] for prompt in ("a circle", "a circle", "stars")]
    encoded = EncodedPrompts(pipeline)
    found = encoded(runs)
    assert calls == [["a circle", "stars"]]
    for name, values in pipeline.conditions(runs).items():
        np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)
    assert any(name.startswith(NEGATIVE) for name in found)


@pytest.mark.parametrize("kept", [0, 3])
def test_what_is_kept_has_a_bound(tiny_bundle, kept):
    pipeline, backend, _ = fake_pipeline(Bundle.open(tiny_bundle))
    one = EncodedPrompts(pipeline)
    one([pipeline.resolve([Request("0")])[0]])
    bound = kept * one.bytes
    encoded = EncodedPrompts(pipeline, bound)
    runs = [pipeline.resolve([Request(str(number))])[0] for number in range(5)]
    for run in [*runs, runs[4], runs[2], runs[0], runs[2]]:
        assert next(iter(encoded([run]).values())).shape[0] == 1
        assert encoded.bytes <= bound
    # of the last four, three are known: 0 takes the place of 3
    assert rows(backend) == 1 + (5 + 1 if kept else 9)
