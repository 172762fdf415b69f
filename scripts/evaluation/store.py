"""The pictures that `evaluate.py` compares, or the clips: made once, kept in a folder, read again.

The folder holds ``run.json``, what all its pictures were made with, and for every schedule and number of steps a folder
``pictures/<schedule>-<steps>-steps`` with ``<hash of the prompt>-<seed>.png`` and, written after it, ``.json``. A clip
is one such file, its frames one below the other: nothing is lost, and any viewer shows it.
"""

import hashlib
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from os import cpu_count
from pathlib import Path
from platform import machine, processor
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from ddit.runtime import Pipeline, Result
from ddit.runtime.console import say
from ddit.runtime.errors import DditError, UsageError
from ddit.runtime.files import whole
from ddit.runtime.policies import Fixed
from ddit.runtime.shapes import Size
from evaluation.metrics import Pictures, Sample

READ_AT_ONCE = 25


@dataclass(frozen=True)
class Settings:
    """What all pictures of a folder have in common: only then can their times and pixels be compared."""

    bundle: str  # SHA-256 of bundle.json
    backend: str
    threads: int | None
    batch: int
    height: int
    width: int
    guidance: float
    carry: float
    machine: str
    frames: int | None = None  # of a clip

    @property
    def size(self) -> Size:
        """The pictures' or clips'."""
        return Size(self.height, self.width, self.frames)


@dataclass(frozen=True)
class Record:
    """How a picture came about."""

    prompt: str
    seed: int
    schedule: str
    levels: list[int | None]  # of every step; None where it was predicted
    milliseconds: float  # of all steps; of a batch, the picture's share
    # height and width in pixels of every step that ran at a smaller size than the picture's, by the step's number
    smaller: dict[str, list[int]] = field(default_factory=dict)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, with the folders above it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DditError(f"{path.parent} cannot be made: {error.strerror or error}") from None
    with whole(path) as part:
        part.write_bytes(content)


def describe_machine(backend: str) -> str:
    """Processor, cores, and with a GPU backend the GPUs."""
    name = processor() or machine()
    try:
        models = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        name = models[0] if models else name
    except OSError:
        pass  # not Linux
    words = f"{name}, {cpu_count()} cores"
    if backend != "cpu" and (smi := shutil.which("nvidia-smi")):
        query = [smi, "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")
        words += "".join(f", {gpu}" for gpu in gpus if gpu)
    return words


@dataclass(frozen=True)
class Store:
    """A folder of pictures, or of clips."""

    folder: Path
    steps: int
    frames: int = 1  # of a clip

    def check(self, settings: Settings) -> None:
        """Refuse a folder whose pictures were made with other settings (`UsageError`)."""
        path = self.folder / "run.json"
        before = _read_json(path) if path.exists() else asdict(settings)
        for name, value in asdict(settings).items():
            if before.get(name) != value:
                raise UsageError(
                    f"{self.folder} holds pictures made with {name} {before.get(name)}, not {value}; "
                    "choose another --out"
                )

    def claim(self, settings: Settings) -> None:
        """Note what the folder's pictures are made with."""
        write_whole(self.folder / "run.json", json.dumps(asdict(settings), indent=2).encode() + b"\n")

    def picture_file(self, schedule: str, sample: Sample) -> Path:
        """Where a picture lies."""
        folder = re.sub(r"[^\w.,=]+", "-", schedule)
        prompt = hashlib.sha256(sample.prompt.encode()).hexdigest()[:12]
        return self.folder / "pictures" / f"{folder}-{self.steps}-steps" / f"{prompt}-{sample.seed}.png"

    def has(self, schedule: str, sample: Sample) -> bool:
        """Whether a picture and its record are there."""
        path = self.picture_file(schedule, sample)
        return path.is_file() and path.with_suffix(".json").is_file()

    def put(self, schedule: str, sample: Sample, result: Result, milliseconds: float) -> None:
        """Keep a picture or clip; its record comes last, so that whatever has one is whole."""
        path = self.picture_file(schedule, sample)
        content = BytesIO()
        Image.fromarray(np.concatenate([np.asarray(frame) for frame in result.frames])).save(content, format="PNG")
        write_whole(path, content.getvalue())
        smaller = {str(i): [*one.size] for i, one in enumerate(result.trace.steps) if one.size and one.scale < 1}
        record = Record(sample.prompt, sample.seed, schedule, result.trace.levels, milliseconds, smaller)
        write_whole(path.with_suffix(".json"), json.dumps(asdict(record)).encode() + b"\n")

    def record(self, schedule: str, sample: Sample) -> Record:
        """How a picture came about."""
        path = self.picture_file(schedule, sample).with_suffix(".json")
        try:
            return Record(**_read_json(path))
        except TypeError:
            raise DditError(f"{path} is not a record of this version; delete it to make the picture again") from None

    def pictures(self, schedule: str, samples: Sequence[Sample]) -> Iterator[tuple[Sequence[Sample], Pictures]]:
        """Samples with their pictures (N, H, W, 3) uint8, a few at a time: thousands would not fit in memory.

        Of a clip every frame is a picture, and each comes with the clip's sample.
        """
        at_once = max(1, READ_AT_ONCE // self.frames)
        for start in range(0, len(samples), at_once):
            some = samples[start : start + at_once]
            pictures = np.concatenate([self.read(schedule, sample) for sample in some])
            yield [sample for sample in some for _ in range(self.frames)], pictures

    def read(self, schedule: str, sample: Sample) -> Pictures:
        """The frames (F, H, W, 3) uint8 of a clip, of a picture one."""
        path = self.picture_file(schedule, sample)
        try:
            with Image.open(path) as image:
                rows = np.asarray(image.convert("RGB"))
            return rows.reshape(self.frames, -1, *rows.shape[1:])
        except (OSError, ValueError):
            raise DditError(f"{path} is not a picture; delete it to make it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise DditError(f"{path} cannot be read; delete it to make it again")
    return content


def make_missing(
    store: Store, pipeline: Pipeline, schedules: Sequence[str], samples: Sequence[Sample], settings: Settings
) -> None:
    """Make the pictures that are not there yet, prompt by prompt.

    Every prompt runs through all schedules in turn, so that a machine that slows down slows all of them alike.
    """
    store.check(settings)
    missing = [
        (schedule, [sample for sample in samples[start : start + settings.batch] if not store.has(schedule, sample)])
        for start in range(0, len(samples), settings.batch)
        for schedule in schedules
    ]
    jobs = [(schedule, some) for schedule, some in missing if some]
    total, todo = len(schedules) * len(samples), sum(len(some) for _, some in jobs)
    say(f"{total - todo} of {total} pictures are there already, {todo} to make")
    if not jobs:
        return
    options: dict[str, Any] = {
        "height": settings.height,
        "width": settings.width,
        "frames": settings.frames,
        "guidance": settings.guidance,
        "carry": settings.carry,
    }
    patches = pipeline.bundle.manifest.patches
    for batch in sorted({len(some) for _, some in jobs}):  # the first run at a size is slow
        pipeline.batch(["warm up"] * batch, seeds=[0] * batch, schedule=Fixed(patches), **options)
    store.claim(settings)  # only now: a request that the bundle refuses leaves the folder free for another
    console = Console(stderr=True)
    for schedule, some in track(
        jobs, description="making", console=console, transient=True, disable=not console.is_terminal
    ):
        results = pipeline.batch(
            [sample.prompt for sample in some],
            seeds=[sample.seed for sample in some],
            steps=store.steps,
            schedule=schedule,
            **options,
        )
        for sample, result, milliseconds in zip(some, results, shares(results), strict=True):
            store.put(schedule, sample, result, milliseconds)


def shares(results: Sequence[Result]) -> list[float]:
    """Milliseconds of all steps of each picture of a batch: samples that ran together share the time of their call."""
    together = Counter((one.step, one.level, one.scale) for result in results for one in result.trace.steps)
    return [
        sum(one.milliseconds / together[one.step, one.level, one.scale] for one in result.trace.steps)
        for result in results
    ]
