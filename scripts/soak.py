"""See whether a server's memory stays flat under hours of load, in minutes: small pictures, as fast as they come.

    python scripts/soak.py demo.bundle --minutes 10

Starts the real server on a port of this machine, with the bundle's engines, and nothing else is ever asked. Clients do
what clients do, in a random order: they read pictures and streams, leave in the middle, ask for what cannot be met, and
give too little time; and now and then the decoder fails. First they ask for the largest batches of every size, since
engines keep the memory of the largest that they have seen, and a part of the time is for caches to fill. Then
everything comes to rest, memory is measured, and again at the end. It fails where memory has grown.
"""

import gc
import http.client
import json
import random
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import click
import numpy as np

from ddit.runtime import Pipeline, shapes
from ddit.runtime.backends.base import FloatArray
from ddit.runtime.bundle import Manifest
from ddit.runtime.commands.options import BACKEND, BUNDLE, THREADS
from ddit.runtime.console import DditCommand, say, set_up_logging
from ddit.runtime.decoding import Frames, OnFrame
from ddit.runtime.errors import BackendError, DditError
from ddit.runtime.serving.engine_room import EngineRoom
from load import serving

PATIENCE = 120.0  # seconds for an answer
LARGEST_CROWD = 2  # clients whose pictures are a batch of any profile
FILLING = 0.25  # share of the time before the first measurement
FAILING = 97  # of so many calls of the decoder one fails
# growth that says nothing: allocators keep what they may need again
ALLOWED_RESIDENT = 32e6  # bytes, or
ALLOWED_SHARE = 0.05  # of what there was
ALLOWED_TRACED = 4e6  # bytes
PROMPTS = 200  # different ones: what the server keeps of them is there before the first measurement
PARTS = 6  # of the time between the two, to see whether growth goes on
LINES = 5  # that the table of growth has
PATH = "/v1/images/generations"
# what clients do, with a weight
KINDS = {"picture": 40, "stream": 25, "leaves": 12, "hangs up": 8, "hurries": 5, "asks wrongly": 10}
SCHEDULES = ("native", "adaptive", "dynamic+adaptive", "taylorseer:2")
WRONG = ({"schedule": "sometimes"}, {"size": "1x1"}, {"prompt": ""}, {"seed": -1}, {"colour": "red"})


class Client:
    """One of many, which sends a request after another."""

    def __init__(self, port: int, manifest: Manifest, number: int):
        self.pictures = 0  # that were read to their end
        self._port, self._random = port, random.Random(number)
        units = shapes.units(manifest.latent, manifest.patches)
        entry = manifest.profile.entry[0]
        widths, heights = (
            [side for side in (found.minimum, found.minimum + units[name]) if side <= found.maximum]
            for name, found in (("width", entry.width), ("height", entry.height))
        )
        self.sizes = [f"{width}x{height}" for width in widths for height in heights]

    def __call__(self) -> str:
        """Send one; what was done, and what came of it."""
        (kind,) = self._random.choices([*KINDS], [*KINDS.values()])
        values = self._values()
        if kind in ("stream", "leaves"):
            values |= {"stream": True, "progress": True, "partial_images": self._random.randint(0, 2)}
        if kind == "hurries":
            values["timeout"] = 0.001
        if kind == "asks wrongly":
            values |= self._random.choice(WRONG)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        try:
            connection.request("POST", PATH, json.dumps(values), {"content-type": "application/json"})
            if kind == "hangs up":
                return kind
            response = connection.getresponse()
            if kind == "leaves":
                for _ in range(self._random.randint(1, 12)):
                    response.readline()
            else:
                response.read()
            if response.status == 200 and kind != "leaves":
                self.pictures += int(str(values["n"]))
            return f"{kind}: {response.status}"
        finally:
            connection.close()

    def fill(self, size: str, schedule: str) -> None:
        """Ask for many pictures of a size at once, and wait for them."""
        values = {"prompt": "a star", "n": 10, "size": size, "schedule": schedule, "steps": 8, "timeout": PATIENCE}
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE)
        connection.request("POST", PATH, json.dumps(values), {"content-type": "application/json"})
        connection.getresponse().read()
        connection.close()

    def _values(self) -> dict[str, object]:
        """A small picture, of one of many prompts."""
        draw = self._random
        return {
            "prompt": f"a red circle and {draw.randrange(PROMPTS)} stars",
            "n": draw.choice((1, 1, 1, 2, 3)),
            "size": draw.choice(self.sizes),
            "steps": draw.randint(3, 8),
            "schedule": draw.choice(SCHEDULES),
            "seed": draw.randrange(2**31),
            "output_format": draw.choice(("png", "jpeg", "webp")),
            "trace": draw.random() < 0.2,
        }


def failing(pipeline: Pipeline) -> Callable[[FloatArray, OnFrame | None], list[Frames]]:
    """The pipeline's decoder, which fails now and then."""
    decode, calls = pipeline.decode, 0

    def decode_or_fail(latents: FloatArray, on_frame: OnFrame | None = None) -> list[Frames]:
        nonlocal calls
        calls += 1
        if calls % FAILING == 0:
            raise BackendError("this call fails on purpose")
        return decode(latents, on_frame)

    return decode_or_fail


def run(clients: Sequence[Client], seconds: float) -> Counter[str]:
    """Let all send requests for so long; what came of them."""
    end, outcomes, errors = time.monotonic() + seconds, Counter[str](), list[Exception]()
    lock = threading.Lock()

    def one(client: Client) -> None:
        while time.monotonic() < end and not errors:
            try:
                outcome = client()
            except (OSError, http.client.HTTPException) as error:
                errors.append(error)
                return
            with lock:
                outcomes[outcome] += 1

    together([partial(one, client) for client in clients])
    if errors:
        raise BackendError(f"a client got no answer: {errors[0]!r}")
    return outcomes


def together(calls: Sequence[Callable[[], None]]) -> None:
    """Call all at once, each in a thread, and wait for their ends."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@dataclass(frozen=True)
class Memory:
    """Of this process, which server and clients share, at rest."""

    resident: int  # bytes
    traced: int  # bytes of Python's objects and NumPy's arrays
    snapshot: tracemalloc.Snapshot

    @classmethod
    def measured(cls) -> "Memory":
        """Now."""
        gc.collect()
        traced, _ = tracemalloc.get_traced_memory()
        ours = [tracemalloc.Filter(False, tracemalloc.__file__)]
        return cls(resident(), traced, tracemalloc.take_snapshot().filter_traces(ours))


def resident() -> int:
    """Bytes of memory that this process holds, as Linux counts them."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096


def at_rest(room: EngineRoom) -> None:
    """Wait until nothing is open. Raises `BackendError` where something stays."""
    end = time.monotonic() + PATIENCE
    while not room.idle or room.session.samples:
        if time.monotonic() > end:
            raise BackendError(f"{room.open} pictures are still open {PATIENCE:g} s after the last request")
        time.sleep(0.05)


def report(before: Memory, after: Memory, seen: Sequence[int]) -> str:
    """The measurements as Markdown, and the lines of code whose objects grew most."""
    rows = [("resident", before.resident, after.resident), ("Python's objects and arrays", before.traced, after.traced)]
    lines = ["| memory | after filling | at the end |", "|---|---|---|"]
    lines += [f"| {name} | {one / 1e6:.1f} MB | {other / 1e6:.1f} MB |" for name, one, other in rows]
    if len(seen) >= PARTS:
        medians = [f"{np.median(part) / 1e6:.1f}" for part in np.array_split(seen, PARTS)]
        lines += ["", f"resident under load, in the median of every {PARTS}th of the time: {', '.join(medians)} MB"]
    lines += ["", "| grew most | by | objects |", "|---|---|---|"]
    for change in after.snapshot.compare_to(before.snapshot, "lineno")[:LINES]:
        frame = change.traceback[0]
        place = "/".join(Path(frame.filename).parts[-2:])
        lines.append(f"| {place}:{frame.lineno} | {change.size_diff / 1e3:+.1f} kB | {change.count_diff:+d} |")
    return "\n".join(lines)


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@BUNDLE
@click.option("--minutes", type=click.FloatRange(0.05, 24 * 60), default=10.0, show_default=True)
@click.option("--clients", type=click.IntRange(1, 64), default=6, show_default=True)
@BACKEND
@THREADS
def main(bundle: Path, minutes: float, clients: int, backend: str | None, threads: int | None) -> None:
    """Load a server with all that clients do, and print its memory after a while and at the end."""
    set_up_logging(0)
    pipeline = Pipeline.open(bundle, backend=backend, threads=threads)
    pipeline.decode = failing(pipeline)  # type: ignore[assignment, method-assign]
    room = EngineRoom(pipeline)
    tracemalloc.start()
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(minutes * 60 / 200):
            seen.append(resident())

    with serving(room) as port:
        crowd = [Client(port, pipeline.bundle.manifest, number) for number in range(clients)]
        for size, schedule in product(crowd[0].sizes, SCHEDULES):
            together([partial(client.fill, size, schedule) for client in crowd[:LARGEST_CROWD]])
        outcomes = run(crowd, minutes * 60 * FILLING)
        at_rest(room)
        before = Memory.measured()
        say(f"{outcomes.total()} requests for caches to fill")
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            outcomes = run(crowd, minutes * 60 * (1 - FILLING))
        finally:
            over.set()
            watcher.join()
        at_rest(room)
        after = Memory.measured()
    tracemalloc.stop()
    pictures = sum(client.pictures for client in crowd)
    click.echo(f"{pictures} pictures in {minutes:g} minutes; requests after filling: "
               + ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items())))  # fmt: skip
    click.echo(f"\n{report(before, after, seen)}")
    grown, more = after.resident - before.resident, after.traced - before.traced
    if grown > max(ALLOWED_RESIDENT, ALLOWED_SHARE * before.resident) or more > ALLOWED_TRACED:
        raise DditError(
            f"memory grew by {grown / 1e6:.1f} MB, objects by {more / 1e6:.1f} MB; the lines above say where"
        )


if __name__ == "__main__":
    main()
