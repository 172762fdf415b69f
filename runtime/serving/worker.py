"""The thread that owns an engine room, and how coroutines ask it for pictures.

async with worker.order(jobs) as order:      # leaving it gives up what is not done
    async for index, event in order:         # until every job is closed
        ...
"""

import asyncio
import logging
import math
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from types import TracebackType

from ddit.runtime.errors import BackendError, DditError, NotFiniteError
from ddit.runtime.serving.engine_room import EngineRoom
from ddit.runtime.serving.tickets import Closed, Event, Job, RoomFullError, Stepped, Ticket

log = logging.getLogger(__name__)

Command = Callable[[], None]
OnTurn = Callable[[EngineRoom, Sequence[Event]], None]

FAILURES = 3  # in a row after which the engines are taken to be broken
RECENT = 0.1  # share of the newest picture in how fast they are made


class Worker:
    """Runs an engine room in a thread of its own."""

    def __init__(
        self,
        room: EngineRoom,
        *,
        warm_up: Command = lambda: None,
        on_turn: OnTurn = lambda room, events: None,
        on_break: Command = lambda: None,
    ):
        """What is run in the thread: ``warm_up`` before the first request, ``on_turn`` after every tick.

        ``on_break``: when the thread has failed, and only another process can help.
        """
        self.room = room
        self.ready = threading.Event()  # warmed up
        self.broken: str | None = None  # why nothing can be made any more
        self.capacity = room.in_flight + room.room_to_wait
        self.open = 0  # pictures that were ordered and are not closed; counted in the event loop
        self._warm_up, self._on_turn, self.on_break = warm_up, on_turn, on_break
        self._orders: dict[Ticket, tuple[Order, int]] = {}
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._cancelled: list[Event] = []
        self._failures = 0
        # the last one that was counted; weak, because its traceback holds all that the call worked on
        self._failure: Callable[[], DditError | None] = lambda: None
        self.seconds_apart = 1.0  # between two finished pictures, lately
        self._finished = -math.inf  # on the room's clock, when the last one was
        self._thread = threading.Thread(target=self._run, name="engine-room", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what was ordered, then end the thread."""
        self._inbox.put(None)
        self._thread.join()

    def order(self, jobs: Sequence[Job], *, steps: bool = True) -> "Order":
        """Order pictures, all or none; in an event loop. ``steps``: be told of every one.

        Raises `RoomFullError`, or `BackendError` when broken.
        """
        if self.broken:
            raise BackendError(self.broken)
        if self.open + len(jobs) > self.capacity:
            seconds = len(jobs) * self.seconds_apart  # until so many places are free
            raise RoomFullError(
                f"{self.open} pictures are being made or wait, of at most {self.capacity}; try later", seconds
            )
        self.open += len(jobs)
        return Order(self, jobs, steps)

    def call(self, command: Command) -> None:
        """Have something done in the thread, between two ticks."""
        self._inbox.put(command)

    def _run(self) -> None:
        try:
            self._warm_up()
            self.ready.set()
            while self._turn():
                pass
        except Exception as error:
            # one of ours says all in its line
            log.error("the engine room has stopped: %s", error, exc_info=not isinstance(error, DditError))
            self._break(f"the engine room has stopped: {error}")

    def _turn(self) -> bool:
        """Do what was asked for, then a tick; wait where there is nothing to do. False at the end."""
        wait, ending = self.room.idle, False
        with suppress(queue.Empty):
            while True:
                command = self._inbox.get(block=wait)
                wait = False
                if command is None:
                    ending = True
                else:
                    command()
        if ending and self.room.idle:
            return False
        if ending:  # what was ordered is done first
            self._inbox.put(None)
        events = [] if self.room.idle else self.room.tick()
        for event in events:
            self._tell(event)
        self._on_turn(self.room, [*self._cancelled, *events])
        self._cancelled.clear()
        return True

    def _tell(self, event: Event) -> None:
        order, index = self._orders[event.ticket]
        if isinstance(event, Closed):
            del self._orders[event.ticket]
            self._judge(event)
        order.tell(index, event)

    def _judge(self, event: Closed) -> None:
        """Learn from an end how fast pictures are made, and whether the engines work."""
        if isinstance(event.error, BackendError) and not isinstance(event.error, NotFiniteError):
            if event.error is self._failure():
                return  # of the same call, which several pictures shared
            self._failure = weakref.ref(event.error)
            self._failures += 1
            if self._failures >= FAILURES:
                self.broken = f"the engines have failed {self._failures} times in a row: {event.error}"
        elif event.result is not None:
            self._failures = 0
            ticket = event.ticket
            seconds = ticket.closed - max(ticket.arrived, self._finished)
            self._finished = ticket.closed
            self.seconds_apart += RECENT * (seconds - self.seconds_apart)

    def _break(self, reason: str) -> None:
        """Tell everybody that nothing will come."""
        self.broken = reason
        self.on_break()
        for ticket, (order, index) in list(self._orders.items()):
            order.tell(index, Closed(ticket, error=BackendError(reason)))
        self._orders.clear()
        while True:  # whoever ordered before it was known
            command = self._inbox.get()
            if command is None:
                return
            command()

    def accept(self, order: "Order", jobs: Sequence[Job]) -> None:
        """Take an order; in the thread."""
        try:
            if self.broken:
                raise BackendError(self.broken)
            tickets = self.room.accept(jobs)
        except DditError as error:
            order.refuse(error, len(jobs))
            return
        order.tickets = tickets
        self._orders |= {ticket: (order, index) for index, ticket in enumerate(tickets)}

    def cancel(self, order: "Order") -> None:
        """Give up what is left of an order; in the thread."""
        for ticket in order.tickets:
            self._orders.pop(ticket, None)
            if end := self.room.cancel(ticket):
                self._cancelled.append(end)


class Order:
    """Some jobs of one client, and what becomes of them. Belongs to an event loop."""

    def __init__(self, worker: Worker, jobs: Sequence[Job], steps: bool):
        self._steps = steps
        self.tickets: list[Ticket] = []  # the thread's
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event] | DditError] = asyncio.Queue()
        self._open = self._unread = len(jobs)  # jobs that are not closed, and those of whose end nobody has read
        worker.call(lambda: worker.accept(self, jobs))

    async def __aenter__(self) -> "Order":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._open:
            self._worker.call(lambda: self._worker.cancel(self))
            self._close(self._open)

    @property
    def done(self) -> bool:
        """Whether the end of every job was read."""
        return not self._unread

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """The jobs' numbers with what happens to them, until every job is closed. Raises as `next` does."""
        while not self.done:
            yield await self.next()

    async def next(self) -> tuple[int, Event]:
        """The next event. Raises `DditError` where the order was refused."""
        item = await self._events.get()
        if isinstance(item, DditError):
            self._unread = 0
            raise item
        self._unread -= isinstance(item[1], Closed)
        return item

    def tell(self, index: int, event: Event) -> None:
        """Hand an event over; in the worker's thread."""
        if isinstance(event, Stepped) and not self._steps:
            return  # it would cost more than the engines' own work on a small model's step
        self._put((index, event), closes=int(isinstance(event, Closed)))

    def refuse(self, error: DditError, jobs: int) -> None:
        """Hand a refusal over; in the worker's thread."""
        self._put(error, closes=jobs)

    def _put(self, item: tuple[int, Event] | DditError, closes: int) -> None:
        def arrive() -> None:
            self._close(min(closes, self._open))  # fewer where the client has left meanwhile
            self._events.put_nowait(item)

        with suppress(RuntimeError):  # the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(arrive)

    def _close(self, count: int) -> None:
        self._open -= count
        self._worker.open -= count
