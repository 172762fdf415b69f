"""``results.jsonl``: what a folder's pictures are, one JSON object a line.

A picture's record is appended once its file is there whole, so that a killed run leaves the records of all that it has
made. While a run is going on they stand in the order in which pictures are finished, afterwards in that of the prompts.
Processes that make pictures for one folder at the same time have files of their own, which `gather` joins.
"""

import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddit.runtime import strict_json
from ddit.runtime.batch.lines import Wanted
from ddit.runtime.errors import UsageError
from ddit.runtime.files import PARTIAL, whole
from ddit.runtime.pipeline import Result

RESULTS = "results.jsonl"
OF_A_PROCESS = ".results-"  # the beginning of the names of files that one of several processes writes

Record = dict[str, Any]


class Results:
    """A file of records that grows. Any thread may append."""

    def __init__(self, folder: Path, process: str | None = None):
        """``process``: a name that no other process at work has; None where there is only one."""
        name = RESULTS if process is None else f"{OF_A_PROCESS}{process}.jsonl"
        self._file = (folder / name).open("a", encoding="utf-8")
        self._lock = threading.Lock()

    def append(self, record: Record) -> None:
        """Add a record; it is on the disk afterwards."""
        with self._lock:
            self._file.write(strict_json.dump(record) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more will come."""
        self._file.close()


def record_of(wanted: Wanted, result: Result) -> Record:
    """The record of a picture or clip that was made."""
    trace = result.trace
    values = {"prompt": trace.prompt, "seed": trace.seed, "height": trace.height, "width": trace.width}
    if trace.frames is not None:
        values["frames"] = trace.frames
    schedule, backend = trace.schedule["text"], trace.backend
    own = {"id": wanted.id, "file": wanted.file}
    return {**own, **values, "schedule": schedule, "backend": backend, **trace.summary(), "key": wanted.key}


def record_of_failure(wanted: Wanted, error: Exception) -> Record:
    """The record of one that could not be made."""
    return {"id": wanted.id, "file": wanted.file, "prompt": wanted.request.prompt, "error": str(error),
            "key": wanted.key}  # fmt: skip


def read_results(folder: Path) -> dict[str, Record]:
    """The records in a folder by id, the last one of each. Raises `UsageError` for a file that is none of ours."""
    found: dict[str, Record] = {}
    for path in _files(folder):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):  # the last one is empty, or a killed process was writing it
            try:
                record = strict_json.parse(line.decode())
                found[record["id"]] = {**record, "file": str(record["file"]), "key": str(record["key"])}
            except (ValueError, TypeError, KeyError):
                raise UsageError(
                    f"{path}, line {number} is not one that ddit-run wrote; choose another --out, or move it away"
                ) from None
    return found


def gather(folder: Path, found: dict[str, Record], order: Iterable[str]) -> None:
    """Write records to ``results.jsonl``, the ids of ``order`` first and in it.

    The processes' own files go, and whatever killed ones had not finished writing.
    """
    ids = dict.fromkeys([*(one for one in order if one in found), *found])
    with whole(folder / RESULTS) as part:
        part.write_text("".join(strict_json.dump(found[one]) + "\n" for one in ids), encoding="utf-8")
    for path in (*folder.glob(f"{OF_A_PROCESS}*.jsonl"), *folder.glob(f".*{PARTIAL}*")):
        with suppress(OSError):
            path.unlink()


def _files(folder: Path) -> Sequence[Path]:
    """The files of records, the joint one first: processes' own are newer."""
    return [path for path in (folder / RESULTS, *sorted(folder.glob(f"{OF_A_PROCESS}*.jsonl"))) if path.is_file()]
