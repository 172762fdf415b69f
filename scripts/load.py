"""Measure a server under load: latency and throughput by the number of clients, for three ways to batch.

    python scripts/load.py demo.bundle --clients 1 --clients 16 --plot docs/images/serving.png

Starts the real server on a port of this machine for every way, and nothing else is ever asked. The clients are threads
of another process. Every one sends its next request when the last one is answered. The three ways are the same engine
room with other rules, and ``--no-http`` measures the rooms without servers:

    one at a time      a picture is begun when the one before is done
    request level      requests of one size and number of steps form a batch, and the next batch begins when it is done
    step level         ddit-run serve: whoever can share a step does, and requests come and go in the middle of others'
"""

import http.client
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import uvicorn

from ddit.runtime import Pipeline
from ddit.runtime.commands.options import BACKEND, BUNDLE, THREADS
from ddit.runtime.console import DditCommand, say, set_up_logging
from ddit.runtime.errors import BackendError
from ddit.runtime.files import check_outputs, whole
from ddit.runtime.serving.app import create_app
from ddit.runtime.serving.engine_room import EngineRoom
from ddit.runtime.serving.metrics import Metrics
from ddit.runtime.serving.schema import ImageRequest
from ddit.runtime.serving.server import SWITCH_SECONDS, PatientProtocol, listen, warmed_up
from ddit.runtime.serving.tickets import Closed, Job, State, Ticket
from ddit.runtime.serving.worker import Worker
from ddit.runtime.tools.plots import figure, save

PATIENCE = 600.0  # seconds for one picture
LATENCIES = (50, 95, 99)  # percentiles

# of ten requests: what an application with several kinds of users may send
MIXTURE = (
    {"schedule": "adaptive"},
    {"schedule": "native", "steps": 20},
    {"schedule": "adaptive"},
    {"schedule": "adaptive", "steps": 30},
    {"schedule": "native", "steps": 10},
    {"schedule": "adaptive"},
    {"schedule": "dynamic+adaptive"},
    {"schedule": "adaptive", "steps": 30},
    {"schedule": "native", "steps": 4},
    {"schedule": "adaptive"},
)
LOADS = {"equal": ({"schedule": "native", "steps": 20},), "mixed": MIXTURE}
PROMPTS = ("a red circle", "a blue square on a striped background", "two green stars", "a yellow cross on noise")


class RequestLevel(EngineRoom):
    """Batches of requests: the next one begins when the last one is done."""

    def starters(self) -> list[Ticket]:
        """The oldest, with those like it; nobody while pictures are being made."""
        if self.count(State.WAITING) < self.open:
            return []
        chosen = super().starters()
        return [one for one in chosen if kind(one) == kind(chosen[0])]


def kind(ticket: Ticket) -> tuple[object, ...]:
    """What requests have in common that could share a batch."""
    return ticket.run.size, ticket.run.steps


def rooms(pipeline: Pipeline, clock: Callable[[], float] = time.perf_counter) -> dict[str, EngineRoom]:
    """The ways to batch."""
    return {
        "one at a time": EngineRoom(pipeline, in_flight=1, clock=clock),
        "request level": RequestLevel(pipeline, clock=clock),
        "step level": EngineRoom(pipeline, clock=clock),
    }


@dataclass(frozen=True)
class Measured:
    """One way, one number of clients."""

    way: str
    clients: int
    latencies: tuple[float, ...]  # seconds, of every request
    seconds: float  # of all

    @property
    def throughput(self) -> float:
        """Pictures a second."""
        return len(self.latencies) / self.seconds

    def percentile(self, percent: float) -> float:
        """Of the latencies, in seconds."""
        return float(np.percentile(self.latencies, percent))


def joined(parts: Sequence[Measured]) -> Measured:
    """Several rounds as one."""
    latencies = tuple(seconds for part in parts for seconds in part.latencies)
    return replace(parts[0], latencies=latencies, seconds=sum(part.seconds for part in parts))


@contextmanager
def serving(room: EngineRoom) -> Iterator[int]:
    """A server over a room; the port."""
    metrics = Metrics(room.pipeline.bundle.manifest)
    worker = Worker(room, warm_up=lambda: warmed_up(room), on_turn=metrics.observe)
    listening = listen("127.0.0.1", 0)
    config = uvicorn.Config(create_app(worker, metrics), http=PatientProtocol, access_log=False, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        worker.ready.wait()
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def ask(port: int, values: dict[str, object]) -> float:
    """Seconds of one request. Raises `BackendError` where there is no picture."""
    begin = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request("POST", "/v1/images/generations", json.dumps(values), {"content-type": "application/json"})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    if response.status != 200:
        raise BackendError(f"the server answered {response.status}: {body[:300].decode(errors='replace')}")
    return time.perf_counter() - begin


def load(port: int, way: str, clients: int, requests: Sequence[dict[str, object]]) -> Measured:
    """Send requests, each by the first client that is free."""
    waiting, lock = iter(requests), threading.Lock()
    latencies: list[float] = []
    errors: list[Exception] = []

    def client() -> None:
        while not errors:
            with lock:
                values = next(waiting, None)
            if values is None:
                return
            try:
                latencies.append(ask(port, values))
            except (BackendError, OSError) as error:
                errors.append(error)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise BackendError(f"{way}, {clients} clients: {errors[0]}")
    return Measured(way, clients, tuple(latencies), time.perf_counter() - begin)


def load_room(room: EngineRoom, way: str, clients: int, requests: Sequence[dict[str, object]]) -> Measured:
    """The same without a server: the room alone, with as many tickets open as there would be clients."""
    waiting = iter(requests)
    latencies: list[float] = []
    begin = room.clock()
    for one in islice(waiting, clients):
        ask_room(room, one)
    while not room.idle:
        for event in room.tick():
            if isinstance(event, Closed):
                if event.error:
                    raise event.error
                latencies.append(event.ticket.closed - event.ticket.arrived)
                for one in islice(waiting, 1):
                    ask_room(room, one)
    return Measured(way, clients, tuple(latencies), room.clock() - begin)


def ask_room(room: EngineRoom, values: dict[str, object]) -> None:
    """Ask for what a request's body asks for."""
    room.accept([Job(room.resolve(one)) for one in ImageRequest.model_validate(values).requests()])


def requests_of(name: str, count: int) -> list[dict[str, object]]:
    """So many requests of a load."""
    prompts, kinds = cycle(PROMPTS), cycle(LOADS[name])
    return [
        {"prompt": prompt, "seed": seed, "output_format": "jpeg", **values}
        for seed, prompt, values in islice(zip(range(count), prompts, kinds, strict=False), count)
    ]


def table(results: Sequence[Measured]) -> str:
    """Markdown."""
    names = " | ".join(f"{percent} %" for percent in LATENCIES)
    lines = [f"| clients | batching | pictures/s | {names} |", "|---|---|---|" + "---|" * len(LATENCIES)]
    for one in results:
        figures = " | ".join(f"{one.percentile(percent):.2f} s" for percent in LATENCIES)
        lines.append(f"| {one.clients} | {one.way} | {one.throughput:.2f} | {figures} |")
    return "\n".join(lines)


def plot(results: Sequence[Measured], path: Path) -> None:
    """Throughput and the slowest latencies against the number of clients."""
    drawing = figure()
    left, right = drawing.subplots(1, 2)
    for way in dict.fromkeys(one.way for one in results):
        own = [one for one in results if one.way == way]
        clients = [one.clients for one in own]
        left.plot(clients, [one.throughput for one in own], marker="o", label=way)
        right.plot(clients, [one.percentile(99) for one in own], marker="o", label=way)
    for axis, name in ((left, "pictures a second"), (right, "99th percentile of the latency, s")):
        ticks = sorted({one.clients for one in results})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("clients")
        axis.set_title(name, fontsize=10)
    left.legend(fontsize=8)
    save(drawing, path)


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@BUNDLE
@click.option("--load", "name", type=click.Choice([*LOADS]), default="mixed", show_default=True)
@click.option("--clients", type=click.IntRange(1, 64), multiple=True, default=(1, 4, 16, 64), show_default=True)
@click.option("--requests", type=click.IntRange(1, 10_000), default=24, show_default=True,
              help="Of a round; twice as many as there are clients at least.")  # fmt: skip
@click.option(
    "--rounds", type=click.IntRange(1, 100), default=3, show_default=True, help="In which the ways take turns."
)
@click.option("--http/--no-http", default=True, show_default=True, help="Through a server, or the engine room alone.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw the figures (.png, .svg, .pdf).")
@BACKEND
@THREADS
def main(
    bundle: Path,
    name: str,
    clients: tuple[int, ...],
    requests: int,
    rounds: int,
    http: bool,
    plot_file: Path | None,
    backend: str | None,
    threads: int | None,
) -> None:
    """Print a table of latencies and throughput, for one at a time, batches of requests and batches of steps."""
    set_up_logging(0)
    check_outputs([plot_file] if plot_file else [])
    pipeline = Pipeline.open(bundle, backend=backend, threads=threads)
    results = []
    sys.setswitchinterval(SWITCH_SECONDS)
    with ExitStack() as stack:
        ways = rooms(pipeline)
        if http:
            ports = {way: stack.enter_context(serving(room)) for way, room in ways.items()}
            apart = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))

        def measured(way: str, count: int, sent: Sequence[dict[str, object]]) -> Measured:
            if http:
                return apart.submit(load, ports[way], way, count, sent).result()
            return load_room(ways[way], way, count, sent)

        for way in ways:
            measured(way, max(clients), requests_of(name, 2 * max(clients)))  # engines see every batch once
        for count in clients:
            sent = requests_of(name, max(requests, 2 * count))
            # in turn, so that whatever else the machine does meets all of them
            parts = [{way: measured(way, count, sent) for way in ways} for _ in range(rounds)]
            results += [joined([part[way] for part in parts]) for way in ways]
            say(f"{count} clients are done")
    click.echo(table(results))
    if plot_file:
        with whole(plot_file) as part:
            plot(results, part)


if __name__ == "__main__":
    main()
