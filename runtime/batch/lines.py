"""A file of prompts: JSON Lines or CSV, by its ending, with a picture's or clip's options on every line.

{"prompt": "a red circle", "seed": 7, "size": "512x512", "id": "circle"}
{"prompt": "a blue square", "schedule": "native", "steps": 20}
"""

import csv
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddit.runtime import strict_json
from ddit.runtime.bundle import Manifest
from ddit.runtime.errors import UsageError
from ddit.runtime.policies.parse import join_schedule
from ddit.runtime.reading import read_text
from ddit.runtime.request import Request

LARGEST_FILE = 256_000_000  # bytes
LONGEST_NAME = 200  # bytes; a file that is being written has a few more
FORBIDDEN = '/\\:*?"<>|'  # in names, on one system or another
SUFFIXES = {".jsonl", ".csv"}


class Line(BaseModel):
    """A line as it stands in the file. What it leaves out is the command's option, or the bundle's choice."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    id: str | int | None = None  # names it in results.jsonl, and its file; the line's number if none
    file: str | None = None  # name of its file, ending included; the id's if none
    seed: int | None = Field(None, ge=0)
    size: str | None = Field(None, pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")  # WIDTHxHEIGHT, pixels
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    schedule: str | None = None
    reuse: str | None = None
    budget: float | None = None  # seconds
    guidance: float | None = None
    negative_prompt: str | None = None
    carry: float | None = None
    text_length: int | None = None

    def request(self, defaults: Mapping[str, Any]) -> Request:
        """The request, with ``defaults`` by `Request`'s names for what the line leaves open. Raises `UsageError`."""
        given = self.model_dump(exclude_none=True, exclude={"id", "file", "size", "reuse"})
        if self.size is not None:
            if self.height is not None or self.width is not None:
                raise UsageError("give size, or height and width")
            given["width"], given["height"] = map(int, self.size.split("x"))
        if self.reuse is not None:
            given["schedule"] = join_schedule(self.schedule, self.reuse)
        # a budget chooses the schedule, so that a line with one of them has no use for a default of the other
        useless = {"budget"} if "schedule" in given else {"schedule"} if "budget" in given else set()
        return Request(**{**{name: value for name, value in defaults.items() if name not in useless}, **given})


@dataclass(frozen=True)
class Wanted:
    """A picture or clip to make."""

    line: int  # its number in the file, from 1
    id: str
    file: str  # its name in the folder
    request: Request
    key: str  # the same for the same request to the same bundle

    def to_json(self) -> str:
        """For another process."""
        return strict_json.dump(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Wanted":
        """What `to_json` wrote."""
        values = strict_json.parse(text)
        return cls(**{**values, "request": Request(**values["request"])})


def read_lines(path: Path, defaults: Mapping[str, Any], manifest: Manifest, suffix: str) -> list[Wanted]:
    """What a file asks for, in its order. ``suffix`` is the ending of files whose name no line gives.

    Raises `UsageError` with the number of the first line that is wrong.
    """
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise UsageError(f"{path} must be JSON Lines or CSV; name it .jsonl or .csv")
    try:
        text = read_text(path, LARGEST_FILE).removeprefix("\ufeff")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    bundle = hashlib.sha256(manifest.model_dump_json(exclude={"parity", "made_with"}).encode()).hexdigest()
    wanted: list[Wanted] = []
    ids: dict[str, int] = {}
    files: dict[str, int] = {}
    number = 0
    try:
        for number, values in _json_lines(text) if kind == ".jsonl" else _csv_lines(text):
            line = _line(values, strict=kind == ".jsonl")
            name = f"{number:05}" if line.id is None else str(line.id)
            file = f"{name}{suffix}" if line.file is None else line.file
            _check_name("id", name)
            _check_name("file name", file)
            # files that differ in capital letters alone are one file on some systems
            for what, seen in ((name, ids), (file.casefold(), files)):
                if what in seen:
                    raise UsageError(f"line {seen[what]} has the same {'id' if seen is ids else 'file'}, {what!r}")
                seen[what] = number
            request = line.request(defaults)
            wanted.append(Wanted(number, name, file, request, _key(bundle, request)))
    except UsageError as error:
        raise at_line(path, number, error) from None
    except _BrokenLineError as error:
        raise at_line(path, error.line, error) from None
    if not wanted:
        raise UsageError(f'{path} has no prompts; give one a line, as in {{"prompt": "a red circle"}}')
    return wanted


def at_line(path: Path, line: int, error: Exception) -> UsageError:
    """An error that says where it is."""
    return UsageError(f"{path}, line {line}: {error}")


class _BrokenLineError(Exception):
    """Text that is no line of its format."""

    def __init__(self, line: int, message: str):
        super().__init__(message)
        self.line = line


def _json_lines(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = strict_json.parse(line)
        except ValueError as error:
            raise _BrokenLineError(number, f"it is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise _BrokenLineError(number, 'it is not a JSON object; write {"prompt": "…"}')
        yield number, values


def _csv_lines(text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows by column, each with the number of its last line; empty cells are left out."""
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = next(rows, [])
        if "prompt" not in columns or len(set(columns)) < len(columns):
            raise _BrokenLineError(1, "the first line must name the columns, each once, and one must be prompt")
        for row in rows:
            if len(row) > len(columns):
                raise _BrokenLineError(rows.line_num, f"it has {len(row)} cells for {len(columns)} columns")
            values: dict[str, Any] = {name: cell for name, cell in zip(columns, row, strict=False) if cell}
            if values:
                yield rows.line_num, values
    except csv.Error as error:
        raise _BrokenLineError(rows.line_num, f"it is not CSV: {error}") from None


def _line(values: Mapping[str, Any], *, strict: bool) -> Line:
    """Raises `UsageError`. ``strict``: numbers are numbers; in CSV they are text."""
    try:
        return Line.model_validate(values, strict=strict)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][:1])
        if first["type"] == "extra_forbidden":
            raise UsageError(f"there is no option {field!r}; there are {', '.join(Line.model_fields)}") from None
        raise UsageError(f"{field}: {first['msg']}") from None


def _check_name(what: str, name: str) -> None:
    """Raise `UsageError` for what cannot be a file's name everywhere, or would be hidden."""
    long = len(name.encode("utf-8", "replace")) > LONGEST_NAME
    if long or not name.isprintable() or name.startswith(".") or name != name.strip() or set(name) & set(FORBIDDEN):
        raise UsageError(f"the {what} {name[:LONGEST_NAME]!r} cannot name a file in the folder; choose a plain one")
    if not name:
        raise UsageError(f"the {what} is empty; leave it out, or choose one")


def _key(bundle: str, request: Request) -> str:
    """A fingerprint of a request to a bundle."""
    return hashlib.sha256(strict_json.dump([bundle, asdict(request)]).encode()).hexdigest()[:32]


def without_finished(wanted: Sequence[Wanted], found: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Wanted]:
    """What is left to make in a folder whose results are ``found``.

    Raises `UsageError` for a file in the folder that another request made.
    """
    left = []
    for one in wanted:
        record = found.get(one.id)
        if record is None or "error" in record or not (folder / record["file"]).exists():
            left.append(one)
        elif (record["key"], record["file"]) != (one.key, one.file):
            raise UsageError(
                f"{folder / record['file']} was made from another prompt or options than line {one.line} now has, or "
                "with another bundle; choose another --out, or delete it to have it made again"
            )
    return left
