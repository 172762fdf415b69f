"""The engine room: fair, nothing lost or done twice, and every picture as if it had been made alone."""

from collections import Counter
from statistics import mean, median
from time import perf_counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddit.runtime import Bundle, Pipeline, Request
from ddit.runtime.errors import BackendError, UsageError
from ddit.runtime.serving.engine_room import EngineRoom
from ddit.runtime.serving.tickets import Closed, Job, PartialImage, RoomFullError, Started, State, Stepped, Ticket
from fake_engines import fake_pipeline

SMALL = {"height": 64, "width": 64}
TALL = {"height": 128, "width": 64}


@pytest.fixture(scope="module")
def bundle(tiny_bundle) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle) -> Pipeline:
    return Pipeline.open(tiny_bundle, backend="cpu")


def run_dry(room: EngineRoom) -> list[object]:
    """All that happens until the room is idle."""
    events = []
    while not room.idle:
        events += room.tick()
    return events


def native(steps: int, seed: int = 0, **size: int) -> Request:
    return Request("a red circle", seed, steps, "native", **(size or SMALL))


def test_pictures_are_as_if_made_alone_whatever_they_are_batched_with(pipeline):
    requests = [
        Request("a red circle", 1, 9, "native", **SMALL),
        Request("a blue star on the left", 2, 12, "dynamic:warmup=4,tau=2", **TALL),
        Request("a green square", 3, 12, "adaptive:tolerance=0.3", **SMALL),
        Request("a red star", 4, schedule="fixed:2x3,4x3,8x2", **SMALL),
        Request("a red square", 5, 12, "dynamic:warmup=3,tau=2+adaptive:tolerance=0.3", **TALL),
        Request("a green star", 6, 12, "adaptive:tolerance=0.3", guidance=2.0, **SMALL),
        Request("two stars", 7, 9, "native", text_length=24, **SMALL),
        Request("a blue circle", 8, 9, "taylorseer:3", **TALL),
    ]
    room, waiting, closed, shared = EngineRoom(pipeline, in_flight=5), list(requests), {}, 0
    tickets: dict[Ticket, Request] = {}
    while waiting or not room.idle:
        if waiting:  # one more comes at every tick
            request = waiting.pop(0)
            (ticket,) = room.accept([Job(room.resolve(request), partial_images=1)])
            tickets[ticket] = request
        for event in room.tick():
            if isinstance(event, Closed):
                closed[id(tickets[event.ticket])] = event
        shared = max(shared, room.last.members)
    assert shared > 2, "some steps must be shared for this test to say something"
    for request in requests:
        event = closed[id(request)]
        (alone,) = pipeline.run([request])
        assert event.ticket.state is State.FINISHED
        assert event.result.trace.levels == alone.trace.levels
        np.testing.assert_allclose(event.result.latent, alone.latent, atol=1e-5 * np.abs(alone.latent).max())
        pixels = [np.asarray(image, np.int16) for image in (event.result.image, alone.image)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
        assert event.result.trace.encode_milliseconds > 0
        assert event.result.trace.decode_milliseconds > 0


REQUESTS = st.builds(
    lambda seed, schedule, steps, size: Request("a red circle", seed, steps, schedule, **size),
    st.integers(0, 99),
    st.sampled_from(["native", "adaptive:0.1", "dynamic:warmup=3", "dynamic:warmup=3+adaptive", "taylorseer:2"]),
    st.integers(1, 9),
    st.sampled_from([SMALL, TALL]),
)
ORDERS = st.tuples(
    st.floats(0, 0.2),  # seconds after the one before
    st.lists(REQUESTS, min_size=1, max_size=3),
    st.one_of(st.none(), st.floats(0.001, 1.0)),  # deadline
    st.sampled_from([0.25, 1.0, 4.0]),  # weight
    st.integers(0, 2),  # partial images
)
CANCELS = st.tuples(st.floats(0, 2.0), st.integers(0, 30))  # when, and which ticket
THOROUGH = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@THOROUGH
@given(orders=st.lists(ORDERS, min_size=1, max_size=12), cancels=st.lists(CANCELS, max_size=8))
def test_everything_accepted_ends_exactly_once(bundle, orders, cancels):
    pipeline, backend, clock = fake_pipeline(bundle)
    room = EngineRoom(pipeline, in_flight=4, waiting=6, clock=clock)
    arrivals, cancels = list(orders), sorted(cancels)
    next_arrival = arrivals[0][0]
    accepted: list[Ticket] = []
    ends: Counter[Ticket] = Counter()
    cancelled: set[Ticket] = set()
    steps: dict[Ticket, list[int]] = {}
    while arrivals or not room.idle:
        if arrivals and (room.idle or clock.now >= next_arrival):
            clock.now = max(clock.now, next_arrival)
            _, requests, deadline, weight, partial = arrivals.pop(0)
            until = None if deadline is None else clock.now + deadline
            jobs = [Job(room.resolve(request), until, weight, partial) for request in requests]
            before = room.open
            try:
                tickets = room.accept(jobs)
            except RoomFullError:
                assert before + len(jobs) > 10
                assert room.open == before, "an order is taken whole or not at all"
            else:
                accepted += tickets
                steps |= {ticket: [] for ticket in tickets}
            next_arrival = clock.now + (arrivals[0][0] if arrivals else 0)
        while cancels and cancels[0][0] <= clock.now:
            _, which = cancels.pop(0)
            if accepted:
                ticket = accepted[which % len(accepted)]
                was_open = ticket.state.open
                assert (room.cancel(ticket) is not None) == was_open
                if was_open:
                    cancelled.add(ticket)
                    ends[ticket] += 1
        begin = clock.now
        for event in room.tick():
            assert not ends[event.ticket], "nothing follows the end"
            if isinstance(event, Stepped):
                steps[event.ticket].append(event.record.step)
            if isinstance(event, Closed):
                ends[event.ticket] += 1
                deadline = event.ticket.job.deadline
                if event.ticket.state is State.EXPIRED:
                    assert deadline is not None
                    assert deadline <= begin
                else:
                    assert event.ticket.state is State.FINISHED
                    assert event.result is not None
                    assert steps[event.ticket] == list(range(event.ticket.run.steps))
    assert all(ends[ticket] == 1 for ticket in accepted)
    assert set(ends) == set(accepted)
    assert all((ticket.state is State.CANCELLED) == (ticket in cancelled) for ticket in accepted)
    assert not room.session.samples
    assert not backend.workspaces, "buffers that nobody uses"


@THOROUGH
@given(
    clients=st.integers(1, 12), long=st.integers(5, 25), short=st.integers(1, 4), weight=st.sampled_from([0.25, 1.0])
)
def test_no_stream_of_short_requests_starves_a_long_one(bundle, clients, long, short, weight):
    """Virtual time passes the long one's finish after so much work as it takes, times the shares of all."""
    pipeline, _, clock = fake_pipeline(bundle)
    room = EngineRoom(pipeline, in_flight=clients + 1, clock=clock)
    (ticket,) = room.accept([Job(room.resolve(native(long, **TALL)), weight=weight)])
    finished = 0

    def come(count: int) -> None:
        room.accept([Job(room.resolve(native(short, seed))) for seed in range(count)])

    come(clients)
    while ticket.state.open:
        for event in room.tick():
            if isinstance(event, Closed) and event.ticket is not ticket:
                finished += 1
                come(1)  # there are always as many
    tokens = {"long": 32 + 16, "short": 16 + 16}
    work = {"long": long * tokens["long"], "short": short * tokens["short"]}
    assert finished <= work["long"] / weight * (clients + weight) / work["short"] + 2 * clients


@pytest.mark.parametrize(
    ("short", "name"),
    [(native(2), "short"), (Request("a red circle", 0, schedule="fixed:8x20", **TALL), "coarse")],
    ids=["short", "coarse"],
)
def test_short_and_coarse_requests_do_not_wait_behind_long_ones(bundle, short, name):
    pipeline, _, clock = fake_pipeline(bundle)
    alone = EngineRoom(pipeline, clock=clock)
    begin = clock.now
    alone.accept([Job(alone.resolve(short))])
    run_dry(alone)
    needed = clock.now - begin
    room = EngineRoom(pipeline, clock=clock)
    long = room.accept([Job(room.resolve(native(60, seed, **TALL))) for seed in range(20)])
    longest = 0.0
    for _ in range(30):
        room.tick()
        longest = max(longest, room.last.seconds)
    (ticket,) = room.accept([Job(room.resolve(short))])
    begin = clock.now
    while ticket.state.open:
        room.tick()
    assert all(one.state.open for one in long)
    assert clock.now - begin <= needed + 2 * longest


def test_equal_requests_are_served_in_the_order_of_their_arrival(bundle):
    pipeline, _, clock = fake_pipeline(bundle)
    room = EngineRoom(pipeline, clock=clock)
    tickets = room.accept([Job(room.resolve(native(6, seed))) for seed in range(20)])
    closed = [event.ticket for event in run_dry(room) if isinstance(event, Closed)]
    assert closed == tickets


def test_more_weight_finishes_earlier(bundle):
    pipeline, _, clock = fake_pipeline(bundle)
    room = EngineRoom(pipeline, clock=clock)
    room.accept([Job(room.resolve(native(9, seed))) for seed in range(16)])
    (low,) = room.accept([Job(room.resolve(native(9, 97)), weight=0.25)])
    (normal,) = room.accept([Job(room.resolve(native(9, 98)))])
    (high,) = room.accept([Job(room.resolve(native(9, 99)), weight=4.0)])
    closed = [event.ticket for event in run_dry(room) if isinstance(event, Closed)]
    assert closed.index(high) < 8, "in the first batch"
    assert closed[-2:] == [normal, low]


def test_what_runs_really_take_is_learnt(bundle):
    """A run that predicts most of its steps is expected to be as short as the last one of its kind."""
    pipeline, _, clock = fake_pipeline(bundle)
    room = EngineRoom(pipeline, clock=clock)
    adaptive = Request("a red circle", 1, 20, "adaptive:0.1", **SMALL)
    (first,) = room.accept([Job(room.resolve(adaptive))])
    (same,) = room.accept([Job(room.resolve(native(20)))])
    assert first.finish == same.finish, "nothing is known yet"
    run_dry(room)
    assert 0 < first.work < same.work / 2
    now = room.accept([Job(room.resolve(adaptive)), Job(room.resolve(native(20)))])
    ratio = (now[1].finish - now[0].finish) / (same.work - first.work)
    assert ratio == pytest.approx(1.0)


def test_samples_share_calls_up_to_the_profile_s_batch(bundle):
    pipeline, backend, clock = fake_pipeline(bundle)
    room = EngineRoom(pipeline, clock=clock)
    room.accept([Job(room.resolve(native(5, seed))) for seed in range(12)])
    events = run_dry(room)
    assert sum(isinstance(event, Started) for event in events) == 12
    assert backend.calls["level-2", 8] == 5, "the profile's batch is 8"
    assert backend.calls["level-2", 4] == 5
    assert backend.calls["vae_decoder", 1] == 12, "the decoder takes one latent a call"


def test_decoding_and_encoding_come_between_steps_and_not_in_rows(bundle):
    """Whoever denoises waits for one call of the encoders and one of the decoder at most."""
    pipeline, backend, clock = fake_pipeline(bundle)
    room, order = EngineRoom(pipeline, in_flight=40, clock=clock), []
    backend.spoil = lambda graph, inputs, outputs: order.append(graph)
    room.accept([Job(room.resolve(native(60, 0, **TALL)))])
    for seed in range(30):
        length = 16 + seed  # texts that cannot share a call
        room.accept([Job(room.resolve(Request("a star", seed, 1, "native", text_length=length, **SMALL)))])
    run_dry(room)
    kinds = {"t5": "e", "vae_decoder": "d", "level-2": "s"}
    text = "".join(kinds.get(graph, "") for graph in order)
    while_stepping = text[text.index("s") : text.rindex("s")]
    assert max(len(between) for between in while_stepping.split("s")) <= 2


def test_partial_images_come_on_the_way(bundle):
    pipeline, _, clock = fake_pipeline(bundle)
    room = EngineRoom(pipeline, clock=clock)
    room.accept([Job(room.resolve(native(12)), partial_images=3)])
    steps, seen = 0, []
    for event in run_dry(room):
        steps += isinstance(event, Stepped)
        if isinstance(event, PartialImage):
            seen.append((event.index, steps))
            assert event.image.size == (64, 64)
    assert seen == [(0, 3), (1, 6), (2, 9)]


def test_partial_images_may_come_together_where_steps_are_predicted(bundle):
    pipeline, backend, clock = fake_pipeline(bundle)
    room = EngineRoom(pipeline, clock=clock)
    request = Request("a star", 1, 16, "taylorseer:interval=14,first=2", **SMALL)
    room.accept([Job(room.resolve(request), partial_images=3)])
    assert [event.index for event in run_dry(room) if isinstance(event, PartialImage)] == [0, 1, 2]
    assert backend.calls["vae_decoder", 1] == 3 + 1, "the decoder takes one latent a call"


def test_a_request_that_fails_costs_the_others_nothing(bundle):
    pipeline, backend, clock = fake_pipeline(bundle)
    room = EngineRoom(pipeline, clock=clock)
    good, bad = Request("a star", 1, 6, "native", **SMALL), Request("a star", 2, 6, "native", guidance=7.0, **SMALL)

    def spoil(graph, inputs, outputs):
        if graph == "step":  # knows no guidance: the third call's row of the bad one
            calls = sum(count for (name, _), count in backend.calls.items() if name == "step")
            if calls == 3:
                outputs["prediction_error"][1] = np.nan

    backend.spoil = spoil
    one, two, three = room.accept([Job(room.resolve(request)) for request in (good, bad, good)])
    closed = {event.ticket: event for event in run_dry(room) if isinstance(event, Closed)}
    assert [ticket.state for ticket in (one, two, three)] == [State.FINISHED, State.FAILED, State.FINISHED]
    assert "step 3 of 6" in str(closed[two].error)
    assert not backend.workspaces


@pytest.mark.parametrize("graph", ["t5", "level-2", "vae_decoder"])
def test_an_engine_that_fails_closes_those_who_shared_the_call(bundle, graph):
    pipeline, backend, clock = fake_pipeline(bundle)
    room, broken = EngineRoom(pipeline, clock=clock), [True]

    def spoil(name, inputs, outputs):
        if name == graph and broken:
            broken.clear()
            raise BackendError("no more memory")

    backend.spoil = spoil
    tickets = room.accept([Job(room.resolve(native(3, seed))) for seed in range(3)])
    events = run_dry(room)
    assert {ticket.state for ticket in tickets} == {State.FAILED}
    assert {str(event.error) for event in events if isinstance(event, Closed)} == {"no more memory"}
    (later,) = room.accept([Job(room.resolve(native(3)))])
    run_dry(room)
    assert later.state is State.FINISHED
    assert not backend.workspaces
    assert not room.session.samples


def test_a_budget_counts_from_the_request_s_arrival(pipeline):
    room = EngineRoom(pipeline)
    asked = Request("a red circle", 1, 12, budget=30.0, **SMALL)
    too_short = Request("a red circle", 1, 12, budget=1e-6, **SMALL)
    fits, fails = room.accept([Job(room.resolve(asked)), Job(room.resolve(too_short))])
    closed = {event.ticket: event for event in run_dry(room) if isinstance(event, Closed)}
    assert closed[fits].result.trace.steps_per_level() == {2: 12}
    assert isinstance(closed[fails].error, UsageError)
    assert "too short" in str(closed[fails].error)


def test_the_room_s_own_time_is_below_a_millisecond_with_64_requests(bundle):
    pipeline, _, _ = fake_pipeline(bundle)
    room = EngineRoom(pipeline, in_flight=64, clock=perf_counter)
    schedules = ["native", "adaptive:0.1", "dynamic:warmup=3+adaptive", "fixed:2x30,4x60"]
    jobs = [
        Job(room.resolve(Request("a star", seed, 90, schedules[seed % 4], **(SMALL, TALL)[seed % 2])))
        for seed in range(64)
    ]
    room.accept(jobs)
    own = []
    while not room.idle:
        room.tick()
        if room.open == 64:
            own.append(room.last.own_seconds * 1000)
    print(
        f"\n{len(own)} ticks with 64 requests: mean {mean(own):.3f} ms, median {median(own):.3f}, most {max(own):.3f}"
    )
    assert len(own) > 50
    assert median(own) < 1.0


def test_clips_with_two_passes_of_guidance(wan_bundle):
    pipeline = Pipeline.open(wan_bundle, backend="cpu")
    size = {"height": 64, "width": 64, "frames": 5}
    requests = [
        Request("a red circle", 1, 5, "native", guidance=4.0, negative_prompt="stars", **size),
        Request("a blue star", 2, 5, "native", guidance=4.0, **size),
        Request("a blue star", 3, 4, "native", guidance=1.0, **size),
    ]
    room = EngineRoom(pipeline)
    tickets = room.accept([Job(room.resolve(request), previews=True) for request in requests])
    closed = {event.ticket: event for event in run_dry(room) if isinstance(event, Closed)}
    for ticket, request in zip(tickets, requests, strict=True):
        (alone,) = pipeline.run([request])
        latent = closed[ticket].result.latent
        np.testing.assert_allclose(latent, alone.latent, atol=1e-5 * np.abs(alone.latent).max())
        assert len(closed[ticket].result.frames) == 5
