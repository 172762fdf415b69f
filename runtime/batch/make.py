"""Pictures and clips through an engine room that is kept full, and into files as they are finished."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ddit.runtime.batch.lines import Wanted
from ddit.runtime.batch.results import Results, record_of, record_of_failure
from ddit.runtime.errors import BackendError, DditError, NotFiniteError, UsageError
from ddit.runtime.pipeline import Pipeline, Result
from ddit.runtime.saving import save_frames
from ddit.runtime.serving.engine_room import EngineRoom
from ddit.runtime.serving.tickets import Closed, Job, Stepped, Ticket

WRITERS = 2  # threads that compress pictures while the engines go on

OnStep = Callable[[], None]  # told that a picture has taken a step
Outcome = tuple[Wanted, Result | DditError]
OnDone = Callable[[Wanted, DditError | None], None]


def make(room: EngineRoom, wanted: Sequence[Wanted], on_step: OnStep = lambda: None) -> Iterator[Outcome]:
    """Make what is wanted, in whatever order it is finished. Those with a time budget come last, each by itself.

    Raises `BackendError` where an engine fails for another reason than a picture's own numbers.
    """
    todo = deque(sorted(wanted, key=lambda one: one.request.budget is not None))
    opened: dict[Ticket, Wanted] = {}
    while todo or not room.idle:
        while todo and (room.idle if todo[0].request.budget is not None else room.open < 2 * room.in_flight):
            one = todo.popleft()
            try:
                run = room.resolve(one.request)
                if run.budget is not None:
                    room.pipeline.costs(run.size)  # measured before its clock starts
                (ticket,) = room.accept([Job(run)])
            except DditError as error:
                yield one, its_own(error)
            else:
                opened[ticket] = one
        for event in room.tick():
            if isinstance(event, Stepped):
                on_step()
            elif isinstance(event, Closed):
                outcome = event.result or event.error
                assert outcome is not None
                yield opened.pop(event.ticket), outcome if isinstance(outcome, Result) else its_own(outcome)


def make_in_turn(pipeline: Pipeline, wanted: Sequence[Wanted], on_step: OnStep = lambda: None) -> Iterator[Outcome]:
    """The same one after the other, where memory is so short that text encoders and levels take turns."""
    for one in wanted:
        try:
            yield one, pipeline.run([one.request], lambda progress: on_step())[0]
        except DditError as error:
            yield one, its_own(error)


def write_files(
    made: Iterable[Outcome],
    folder: Path,
    results: Results,
    *,
    frames_per_second: float | None,
    on_done: OnDone,
) -> None:
    """Write what is made, and its records. ``frames_per_second`` of clips; None: pictures."""
    with ThreadPoolExecutor(WRITERS) as writers:
        writing: deque[tuple[Wanted, Future[DditError | None]]] = deque()

        def finish(most: int) -> None:
            while len(writing) > most:
                one, done = writing.popleft()
                on_done(one, done.result())

        for one, outcome in made:
            writing.append((one, writers.submit(write, one, outcome, folder, results, frames_per_second)))
            while writing and writing[0][1].done():
                finish(len(writing) - 1)
            finish(2 * WRITERS)  # no more than these are held in memory
        finish(0)


def write(
    one: Wanted, outcome: Result | DditError, folder: Path, results: Results, frames_per_second: float | None
) -> DditError | None:
    """Write a file and then its record; returns what kept it from being made."""
    if isinstance(outcome, Result):
        try:
            save_frames(outcome.frames, folder / one.file, frames_per_second)
        except UsageError as error:  # the format cannot hold it
            outcome = error
        else:
            results.append(record_of(one, outcome))
            return None
    results.append(record_of_failure(one, outcome))
    return outcome


def its_own(error: DditError) -> DditError:
    """The error, where it is this picture's; raised where it would be everybody's."""
    if isinstance(error, BackendError) and not isinstance(error, NotFiniteError):
        raise error
    return error
