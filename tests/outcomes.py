"""What became of a hostile input: it was refused cleanly, it ran, or it went badly."""

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

from click.testing import CliRunner

COUNTS: dict[str, Counter[str]] = {}
PATIENCE = 60  # seconds; whatever takes longer hangs


def judge(arguments: Sequence[object], trace: Path | None = None) -> str:
    """``"ran"``, ``"refused"``, or what was bad, of a ddit-run command in this process."""
    from ddit.runtime.cli import main

    if trace:
        trace.unlink(missing_ok=True)
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        return f"bad: {type(result.exception).__name__}: {result.exception}"
    lines = [line for line in result.stderr.splitlines() if not line.startswith("WARNING: ")]
    if odd := [line for line in (*lines, *result.stdout.splitlines()) if not line.isprintable()]:
        return f"bad: {odd[0]!r} on the terminal"
    if result.exit_code == 0:
        return "ran" if trace is None or is_json(trace) else "bad: the trace is no JSON"
    if result.exit_code not in (1, 2):
        return f"bad: exit code {result.exit_code}"
    if lines and lines[0].startswith("Usage: "):
        return "refused"
    errors = [line for line in lines if line.startswith("error: ")]
    return "refused" if len(errors) == 1 and lines[-1] == errors[0] else f"bad: {result.stderr!r}"


def is_json(path: Path) -> bool:
    """Whether a file is JSON as the standard has it."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    with suppress(ValueError, OSError):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
        return True
    return False


class Elsewhere:
    """Commands in another process, which a crash may take; there is a new one for the next command then."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def judge(self, arguments: Sequence[object], trace: Path | None = None) -> str:
        """As the function of that name."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _quiet)
        try:
            return self._pool.submit(judge, arguments, trace).result(PATIENCE)
        except BrokenProcessPool:
            self._pool = None
            return "bad: the process crashed"
        except TimeoutError:
            self.close()
            return f"bad: it took more than {PATIENCE} seconds"

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            for process in list(self._pool._processes.values()):
                process.kill()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _quiet() -> None:
    """Rust tells of its panics on stderr, whatever Python makes of them."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def count(kind: str, outcome: str) -> None:
    """Keep an outcome for the report; a bad one fails the test."""
    COUNTS.setdefault(kind, Counter())[outcome.partition(":")[0]] += 1
    assert not outcome.startswith("bad"), outcome


def report() -> list[str]:
    """Lines with what was tried and what became of it."""
    rows = [(kind, sum(found.values()), found["refused"], found["ran"], found["bad"]) for kind, found in COUNTS.items()]
    return [f"{'':24}{'tried':>8}{'refused':>9}{'ran':>6}{'bad':>5}"] + [
        f"{kind:24}{tried:8}{refused:9}{ran:6}{bad:5}" for kind, tried, refused, ran, bad in rows
    ]
