"""The engine room: many requests share one bundle's engines, step by step.

    room = EngineRoom(pipeline)
    tickets = room.accept([Job(room.resolve(Request("a red circle", seed=7)))])
    while not room.idle:
        for event in room.tick():
            ...

A tick is one piece of work: text is encoded, samples take one denoising step, or latents become pictures. Samples that
run the same level at the same size share a call, whatever step each is at, up to the batch that the bundle's profile
holds. Who is first follows from virtual time (`ddit.runtime.serving.fairness`). No threads, no waiting, and no clock
but the one that it is given: whoever drives it owns the pipeline's session.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from heapq import nsmallest
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from ddit.runtime import shapes
from ddit.runtime.backends.base import FloatArray
from ddit.runtime.errors import BackendError, DditError, UsageError
from ddit.runtime.pipeline import Pipeline, Result
from ddit.runtime.policies import Decision
from ddit.runtime.request import Request, Run
from ddit.runtime.serving.fairness import VirtualTime, Workload
from ddit.runtime.serving.preview import Colours
from ddit.runtime.serving.prompts import EncodedPrompts
from ddit.runtime.serving.tickets import (
    Closed,
    Event,
    Job,
    PartialImage,
    RoomFullError,
    Started,
    State,
    Stepped,
    Tick,
    Ticket,
    Work,
)
from ddit.runtime.session import Sample, StepError

IN_FLIGHT = 32  # samples that denoise at once, each with buffers of its own
WAITING = 256  # that are accepted beyond them
LARGEST_BATCH = 64  # of any profile
PREVIEW_SECONDS = 0.2  # between two of one picture

Members = list[tuple[Sample, Decision]]


@dataclass(frozen=True, eq=False)
class _Painting:
    """A latent to decode."""

    ticket: Ticket
    latent: FloatArray
    partial: int | None = None  # number of a picture on the way; None: the finished one


class EngineRoom:
    """Requests in flight on one pipeline. Belongs to one thread, all but `resolve`."""

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        in_flight: int = IN_FLIGHT,
        waiting: int = WAITING,
        largest_batch: int = LARGEST_BATCH,
        clock: Callable[[], float] = perf_counter,
    ):
        """``clock`` in seconds; the one that time budgets and deadlines are meant on.

        Raises `BackendError` where text encoders and levels do not fit into memory together.
        """
        if pipeline.backend.low_memory:
            raise BackendError(
                "memory is so short that text encoders and levels take turns, which requests that are served side by "
                "side cannot; take a GPU with more memory, or ddit-run generate"
            )
        manifest = pipeline.bundle.manifest
        self.pipeline = pipeline
        self.session = pipeline.session()
        self.in_flight, self.room_to_wait, self.largest_batch = in_flight, waiting, largest_batch
        self.clock = clock
        self.colours = Colours()
        self._conditions = EncodedPrompts(pipeline)
        self.last = Tick(None, 0, 0, 0.0, 0.0)
        self._time = VirtualTime()
        self._workload = Workload(manifest.latent, manifest.native)
        self._open: dict[Ticket, None] = {}  # in the order of arrival
        self._tickets: dict[Sample, Ticket] = {}
        self._paintings: list[_Painting] = []
        self._limits: dict[tuple[int, ...], int] = {}
        self._since_step: set[Work] = set()  # what was done after the last step that ran a level
        self._elsewhere = 0.0  # seconds of this tick in the engines

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._open

    @property
    def open(self) -> int:
        """How many tickets are open."""
        return len(self._open)

    def count(self, state: State) -> int:
        """How many open tickets are in a state."""
        return sum(ticket.state is state for ticket in self._open)

    def resolve(self, request: Request) -> Run:
        """A request with every question answered; any thread may ask. Raises `UsageError` for what cannot be done."""
        return self.pipeline.resolve([request])[0]

    def accept(self, jobs: Sequence[Job]) -> list[Ticket]:
        """Take jobs, all or none. Raises `RoomFullError`."""
        capacity = self.in_flight + self.room_to_wait
        if len(self._open) + len(jobs) > capacity:
            raise RoomFullError(f"{len(self._open)} pictures are being made or wait, of at most {capacity}; try later")
        now, tickets = self.clock(), []
        for job in jobs:
            finish = self._time.finish(self._workload.expected(job.run), job.weight)
            tickets.append(Ticket(job, now, finish))
        self._open |= dict.fromkeys(tickets)
        return tickets

    def cancel(self, ticket: Ticket) -> Closed | None:
        """Give a ticket up, wherever it is, and return its end, which no tick tells of; None if it was closed."""
        return self._close(ticket, State.CANCELLED) if ticket.state.open else None

    def tick(self) -> list[Event]:
        """Do one piece of work, and say what came of it."""
        begin, self._elsewhere = self.clock(), 0.0
        events: list[Event] = []
        for ticket in [one for one in self._open if one.job.deadline is not None and one.job.deadline <= begin]:
            events.append(self._close(ticket, State.EXPIRED))
        work, members, limit = self._work(events)
        seconds = self.clock() - begin
        self.last = Tick(work, members, limit, seconds, seconds - self._elsewhere)
        return events

    def _work(self, events: list[Event]) -> tuple[Work | None, int, int]:
        """One piece of work: its kind, how many shared it and how many could have."""
        try:
            groups = self._groups()
        except StepError as error:
            self._lose(error, events)
            return Work.STEP, len(error.samples), len(error.samples)
        # a predicted step costs next to nothing and brings its samples to where they can share a level's call
        steps = [group for group in groups if group[0][1].level is None] or groups
        predicting = bool(steps) and steps[0][0][1].level is None
        waiting = self.starters()
        # between two steps there is at most one call of the text encoders and one of the decoder
        if not predicting:
            for kind, wanted in ((Work.DECODE, bool(self._paintings)), (Work.ENCODE, bool(waiting))):
                if wanted and (kind not in self._since_step or not steps):
                    self._since_step.add(kind)
                    return (kind, *(self._decode(events) if kind is Work.DECODE else self._encode(waiting, events)))
        if not steps:
            return None, 0, 0
        if not predicting:
            self._since_step.clear()
        return (Work.STEP, *self._step(min(steps, key=self._first), events))

    def _groups(self) -> list[Members]:
        with self._in_the_engines():
            self.session.run_gates()
        return self.session.groups()

    def _first(self, group: Members) -> float:
        """The earliest virtual finish time in a group."""
        return min(self._tickets[sample].finish for sample, _ in group)

    def _step(self, group: Members, events: list[Event]) -> tuple[int, int]:
        """One step of those of a group who are first."""
        sample, decision = group[0]
        limit = self._limit(sample.run.scales[decision.scale])
        members = nsmallest(limit, group, key=lambda member: self._tickets[member[0]].finish)
        try:
            with self._in_the_engines():
                self.session.advance(members)
        except StepError as error:
            self._lose(error, events)
        done = 0.0
        for sample, decision in members:
            ticket = self._tickets.get(sample)
            if ticket is None or sample.decision is not None:
                continue  # it failed, or another one did before its turn came
            work = self._workload.step(sample.run, decision.level, sample.sizes)
            ticket.work += work
            done += work
            events.append(Stepped(ticket, sample.trace.steps[-1], self._preview(ticket, sample)))
            self._after_step(ticket, sample)
        if self._open:
            self._time.spend(done, sum(ticket.job.weight for ticket in self._open))
        return len(members), limit

    def _preview(self, ticket: Ticket, sample: Sample) -> NDArray[np.uint8] | None:
        """What the estimate looks like, where that was asked for and is not known from just before."""
        now = self.clock()
        if not ticket.job.previews or (now - ticket.previewed < PREVIEW_SECONDS and not sample.done):
            return None
        estimate = sample.history.estimate()
        ticket.previewed = now
        return None if estimate is None else self.colours(estimate)

    def _after_step(self, ticket: Ticket, sample: Sample) -> None:
        """Hand a sample that is done to the decoder, and the estimates of others when they are due."""
        run = ticket.run
        if sample.done:
            self._workload.learn(run, ticket.work)
            latent = self.session.retire(sample)
            del self._tickets[sample]
            ticket.state = State.DECODING
            # the finished picture is there before one on the way could be
            self._paintings = [one for one in self._paintings if one.ticket is not ticket]
            self._paintings.append(_Painting(ticket, latent))
            return
        wanted, done, steps = ticket.job.partial_images, ticket.partial_images, run.steps - run.first_step
        if done < wanted and (sample.history.step - run.first_step) * (wanted + 1) >= steps * (done + 1):
            estimate = sample.history.estimate()
            if estimate is not None:
                self._paintings.append(_Painting(ticket, estimate, done))
                ticket.partial_images += 1

    def starters(self) -> list[Ticket]:
        """The waiting tickets that start next, together: of one text length, those first whose turn it is."""
        flying = sum(ticket.state is not State.WAITING for ticket in self._open)
        waiting = [ticket for ticket in self._open if ticket.state is State.WAITING]
        chosen = nsmallest(self.in_flight - flying, waiting, key=lambda ticket: ticket.finish)
        same = [ticket for ticket in chosen if ticket.run.text_length == chosen[0].run.text_length]
        return same[: self._limit(same[0].run.sizes)] if same else []

    def _encode(self, tickets: Sequence[Ticket], events: list[Event]) -> tuple[int, int]:
        """Encode prompts and start their samples."""
        limit = self._limit(tickets[0].run.sizes)
        begin = self.clock()
        for ticket in tickets:
            ticket.started = begin
        runs: dict[Ticket, Run] = {}
        with self._in_the_engines():
            for ticket in tickets:
                try:
                    runs[ticket] = self.pipeline.within_budget(ticket.run, ticket.arrived, self.clock)
                except DditError as error:
                    events.append(self._close(ticket, State.FAILED, error=error))
            if not runs:
                return len(tickets), limit
            try:
                conditions = self._conditions([*runs.values()])
                samples = self.pipeline.admit(self.session, [*runs.values()], conditions)
            except DditError as error:
                for ticket in runs:
                    events.append(self._close(ticket, State.FAILED, error=error))
                return len(tickets), limit
        milliseconds = (self.clock() - begin) * 1000
        for ticket, sample in zip(runs, samples, strict=True):
            sample.trace.encode_milliseconds = milliseconds
            ticket.sample, ticket.state = sample, State.DENOISING
            self._tickets[sample] = ticket
            events.append(Started(ticket))
        return len(tickets), limit

    def _decode(self, events: list[Event]) -> tuple[int, int]:
        """Decode latents of one size."""
        first = min(self._paintings, key=lambda one: one.ticket.finish)
        limit = self._limit(first.ticket.run.sizes)
        same = [one for one in self._paintings if one.latent.shape == first.latent.shape]
        chosen = nsmallest(limit, same, key=lambda one: one.ticket.finish)
        self._paintings = [one for one in self._paintings if one not in chosen]
        begin = self.clock()
        try:
            with self._in_the_engines():
                clips = self.pipeline.decode(np.stack([one.latent for one in chosen]))
        except DditError as error:
            for one in chosen:
                if one.ticket.state.open:
                    events.append(self._close(one.ticket, State.FAILED, error=error))
            return len(chosen), limit
        milliseconds = (self.clock() - begin) * 1000
        for one, frames in zip(chosen, clips, strict=True):
            if one.partial is None:
                assert one.ticket.sample is not None
                trace = one.ticket.sample.trace
                trace.decode_milliseconds = milliseconds
                self.colours.learn(one.latent, frames[0])
                result = Result(frames, trace, one.latent)
                events.append(self._close(one.ticket, State.FINISHED, result=result))
            else:
                size = one.ticket.run.size
                image = frames[0].resize((size.width, size.height)) if frames[0].height != size.height else frames[0]
                events.append(PartialImage(one.ticket, one.partial, image))
        return len(chosen), limit

    def _lose(self, error: StepError, events: list[Event]) -> None:
        """Close the tickets that an error cost."""
        for sample in error.samples:
            events.append(self._close(self._tickets[sample], State.FAILED, error=error))

    def _close(
        self, ticket: Ticket, state: State, result: Result | None = None, error: DditError | None = None
    ) -> Closed:
        """Take a ticket out of everything."""
        assert ticket.state.open
        if ticket.state is State.DENOISING and ticket.sample:
            self.session.retire(ticket.sample)
            del self._tickets[ticket.sample]
        self._paintings = [one for one in self._paintings if one.ticket is not ticket]
        del self._open[ticket]
        ticket.sample, ticket.state, ticket.closed = None, state, self.clock()
        return Closed(ticket, result, error)

    def _limit(self, sizes: Mapping[str, int]) -> int:
        """The largest batch of samples of a size that the profile holds and the backend runs."""
        key = tuple(sizes.values())
        if key not in self._limits:
            named = shapes.to_names(self.pipeline.bundle.manifest.latent, sizes)
            profile, backend = self.pipeline.bundle.manifest.profile, self.pipeline.backend

            def fits(batch: int) -> bool:
                try:
                    backend.check({**named, "batch": batch})
                except UsageError:
                    return False
                return profile.contains(**{**named, "batch": batch})

            self._limits[key] = max((batch for batch in range(2, self.largest_batch + 1) if fits(batch)), default=1)
        return self._limits[key]

    @contextmanager
    def _in_the_engines(self) -> Iterator[None]:
        """Time that is not the room's own."""
        begin = self.clock()
        try:
            yield
        finally:
            self._elsewhere += self.clock() - begin
