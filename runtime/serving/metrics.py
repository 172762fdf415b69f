"""Prometheus figures of an engine room and its server."""

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ddit.runtime.bundle import Manifest
from ddit.runtime.serving.engine_room import EngineRoom
from ddit.runtime.serving.tickets import Closed, Event, Started, State, Stepped, Tick

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
CALL_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
OWN_SECONDS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01)
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1)


class Figures:
    """What `/metrics` shows of a server whose engine rooms are elsewhere. Any thread may call it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "path", "status")
        self.responses = Counter("ddit_responses", "HTTP responses", labels, registry=self.registry)

    async def text(self) -> bytes:
        """All figures, as Prometheus reads them."""
        return generate_latest(self.registry)


class Metrics(Figures):
    """What it shows of one with an engine room. `observe` belongs to the room's thread."""

    def __init__(self, manifest: Manifest):
        super().__init__()
        self._native = manifest.native
        self._steps, self._coarse = 0, 0
        self._seen: Tick | None = None  # the last tick that was counted

        def made(kind: type, name: str, text: str, labels: Sequence[str] = (), **options: object):  # type: ignore[no-untyped-def]
            return kind(f"ddit_{name}", text, labels, registry=self.registry, **options)

        self.waiting = made(Gauge, "waiting", "Pictures that wait for their turn")
        self.in_flight = made(Gauge, "in_flight", "Pictures that are being made")
        self.pictures = made(Counter, "pictures", "Pictures that were accepted, by what became of them", ["outcome"])
        self.queue = made(Histogram, "queue_seconds", "From acceptance to the first work", buckets=SECONDS)
        self.latency = made(Histogram, "picture_seconds", "From acceptance to the picture", buckets=SECONDS)
        self.steps = made(Counter, "steps", "Denoising steps of pictures, by level", ["level"])
        self.coarse_share = made(Gauge, "coarse_share", "Share of the steps so far that ran a coarse level")
        self.fill = made(Histogram, "batch_fill", "Share of a call's batch that was used", ["work"], buckets=SHARES)
        self.calls = made(Histogram, "call_seconds", "A call of the engines", ["work"], buckets=CALL_SECONDS)
        self.own = made(Histogram, "own_seconds", "The engine room's own time of a tick", buckets=OWN_SECONDS)

    def observe(self, room: EngineRoom, events: Sequence[Event]) -> None:
        """After a turn of the room."""
        waiting = room.count(State.WAITING)
        self.waiting.set(waiting)
        self.in_flight.set(room.open - waiting)
        last = room.last
        if last is not self._seen and last.work is not None:
            self.fill.labels(last.work.value).observe(last.members / last.limit)
            self.calls.labels(last.work.value).observe(last.seconds - last.own_seconds)
            self.own.observe(last.own_seconds)
        self._seen = last
        for event in events:
            if isinstance(event, Started):
                self.queue.observe(event.ticket.started - event.ticket.arrived)
            elif isinstance(event, Stepped):
                self._step(event.record.level)
            elif isinstance(event, Closed):
                self.pictures.labels(event.ticket.state.value).inc()
                if event.ticket.state is State.FINISHED:
                    self.latency.observe(event.ticket.closed - event.ticket.arrived)

    def _step(self, level: int | None) -> None:
        self.steps.labels("predicted" if level is None else str(level)).inc()
        self._steps += 1
        self._coarse += level is not None and level != self._native
        self.coarse_share.set(self._coarse / self._steps)
