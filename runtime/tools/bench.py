"""Measure a bundle's levels: milliseconds of a denoising step, tokens, and peak memory."""

import multiprocessing
import resource
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from multiprocessing.pool import Pool
from pathlib import Path

from ddit.runtime import shapes
from ddit.runtime.pipeline import Pipeline
from ddit.runtime.policies import Fixed

BLOCK = 5  # steps of one level in a row, of which the first two warm the caches up again
WARM_UP = 2


@dataclass(frozen=True)
class Measurement:
    """One level at one size."""

    level: int
    image_tokens: int
    text_tokens: int
    milliseconds: float  # median of a step, its step graph included
    fastest: float
    slowest: float
    peak_memory_mb: float  # of a process that runs this level and the encoders and decoder, from its start
    gpu_memory_mb: float | None  # that its backend holds on the GPU; None on the CPU


@dataclass(frozen=True)
class Job:
    """What to measure, in a process of its own."""

    path: Path
    backend: str
    threads: int | None
    height: int | None
    width: int | None

    def times(self, patches: tuple[int, ...], rounds: int) -> dict[int, list[float]]:
        """Milliseconds of steps, by level; the levels take turns, so that a machine that slows down slows all alike."""
        block = tuple(patch for patch in patches for _ in range(BLOCK))
        pipeline = Pipeline.open(self.path, backend=self.backend, threads=self.threads)
        trace = pipeline("bench", schedule=Fixed(block * (1 + rounds)), height=self.height, width=self.width).trace
        times: dict[int, list[float]] = {patch: [] for patch in patches}
        for number, record in enumerate(trace.steps):
            if number >= len(block) and number % BLOCK >= WARM_UP:
                times[record.level].append(record.milliseconds)
        return times

    def memory(self, patch: int) -> tuple[float, float | None, int, int]:
        """A level's memory on the host and on the GPU in MB (10⁶ bytes), and its image and text tokens."""
        pipeline = Pipeline.open(self.path, backend=self.backend, threads=self.threads)
        trace = pipeline("bench", schedule=Fixed((patch,) * 3), height=self.height, width=self.width).trace
        on_gpu = pipeline.backend.memory_used()
        manifest = pipeline.bundle.manifest
        sizes = shapes.to_symbols(manifest.latent, {"height": trace.height, "width": trace.width})
        tokens = prod(side // patch for side in sizes.values())
        on_host, on_gpu_mb = peak_memory_mb(), None if on_gpu is None else on_gpu / 1e6
        return on_host, on_gpu_mb, tokens, manifest.text_length


def bench(job: Job, patches: tuple[int, ...], repeat: int) -> list[Measurement]:
    """Time ``repeat`` steps of every level, or a few more, in one process, and take each level's memory in another."""
    with _process() as pool:
        times = pool.apply(job.times, (patches, -(-repeat // (BLOCK - WARM_UP))))
    measurements = []
    for patch in patches:
        with _process() as pool:
            on_host, on_gpu, image_tokens, text_tokens = pool.apply(job.memory, (patch,))
        values = times[patch]
        median = statistics.median(values)
        measurements.append(
            Measurement(patch, image_tokens, text_tokens, median, min(values), max(values), on_host, on_gpu)
        )
    return measurements


@contextmanager
def _process() -> Iterator[Pool]:
    """A fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


def peak_memory_mb() -> float:
    """The most memory that this process has held so far, in MB (10⁶ bytes).

    On Linux `getrusage` is not enough: its maximum survives `exec`, so a child starts with what its parent held.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
