"""Measure a bundle's levels: milliseconds of a denoising step, tokens, and peak memory."""

import multiprocessing
import resource
import signal
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing.pool import Pool
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddit.runtime import shapes
from ddit.runtime.backends.base import Backend
from ddit.runtime.backends.registry import open_backend
from ddit.runtime.bundle import Bundle, Manifest
from ddit.runtime.bundle.names import NEGATIVE
from ddit.runtime.conditioning.guidance import guidance_inputs, is_guided
from ddit.runtime.pipeline import Pipeline
from ddit.runtime.policies import Fixed
from ddit.runtime.request import Request
from ddit.runtime.session import Session
from ddit.runtime.shapes import Size
from ddit.runtime.step import sample_buffers, text_inputs

ROUNDS = 5
WARM_UP = 2  # steps of every pattern before those that count


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
    size: Size

    def times(self, patches: tuple[int, ...], repeat: int) -> dict[int, list[float]]:
        """Milliseconds of ``repeat`` steps or a few more, by level."""
        backend = open_backend(self.backend, Bundle.open(self.path), self.threads)
        patterns = [(patch,) for patch in patches]
        each = -(-repeat // ROUNDS)
        times = time_steps(backend, patterns, size=self.size, repeat=each)
        return {patch: times[(patch,)] for patch in patches}

    def memory(self, patch: int) -> tuple[float, float | None]:
        """A level's memory on the host and on the GPU in MB (10⁶ bytes), with the text encoders and the decoder."""
        pipeline = Pipeline.open(self.path, backend=self.backend, threads=self.threads)
        pipeline(
            "bench",
            schedule=Fixed((patch,) * 3),
            height=self.size.height,
            width=self.size.width,
            frames=self.size.frames,
        )
        on_gpu = pipeline.backend.memory_used()
        return peak_memory_mb(), None if on_gpu is None else on_gpu / 1e6


def bench(job: Job, manifest: Manifest, repeat: int) -> list[Measurement]:
    """Time ``repeat`` steps of every level, or a few more, in one process, and take each level's memory in another."""
    with _process() as pool:
        times = pool.apply(job.times, (manifest.patches, repeat))
    symbols = shapes.to_symbols(manifest.latent, job.size.by_name())
    measurements = []
    for patch in manifest.patches:
        with _process() as pool:
            on_host, on_gpu = pool.apply(job.memory, (patch,))
        values = times[patch]
        measurements.append(
            Measurement(
                level=patch,
                image_tokens=shapes.image_tokens(manifest.latent, patch, symbols),
                text_tokens=manifest.text_length,
                milliseconds=statistics.median(values),
                fastest=min(values),
                slowest=max(values),
                peak_memory_mb=on_host,
                gpu_memory_mb=on_gpu,
            )
        )
    return measurements


def time_steps(
    backend: Backend,
    patterns: Sequence[tuple[int, ...]],
    *,
    size: Size,
    repeat: int,
    rounds: int = ROUNDS,
) -> dict[tuple[int, ...], list[float]]:
    """Milliseconds of ``rounds`` times ``repeat`` steps, or a few more, whose levels follow each pattern.

    The patterns take turns, so that a machine that slows down slows all alike.
    """
    times: dict[tuple[int, ...], list[float]] = {pattern: [] for pattern in patterns}
    for _ in range(rounds):
        for pattern in patterns:
            whole = -(-repeat // len(pattern)) * len(pattern)  # every round begins with the pattern's first level
            times[pattern] += _time_steps(backend, pattern, size, whole)
    return times


def _time_steps(backend: Backend, pattern: tuple[int, ...], size: Size, repeat: int) -> list[float]:
    """Steps of one run with random conditions: what the numbers are does not change how long they take."""
    manifest = backend.bundle.manifest
    warm_up = WARM_UP * len(pattern)
    levels = tuple(islice(cycle(pattern), warm_up + repeat))
    run = Request("bench", schedule=Fixed(levels), height=size.height, width=size.width, frames=size.frames).resolve(
        manifest, str(backend)
    )
    session = Session(backend)
    sample = session.admit(run, random_conditions(manifest, run.sizes))
    while not sample.done:
        session.step()
    session.retire(sample)
    return [record.milliseconds for record in sample.trace.steps[warm_up:]]


def random_conditions(manifest: Manifest, sizes: Mapping[str, int]) -> dict[str, NDArray[np.float32]]:
    """Seeded values for the levels' inputs that stay the same in a run, for one sample."""
    rng = np.random.default_rng(0)
    names = list(text_inputs(manifest))
    if is_guided(manifest.guidance, manifest.guidance.default):
        names += [NEGATIVE + name for name in names]
    specs = sample_buffers(manifest)
    drawn = {name: rng.standard_normal(specs[name].resolve({**sizes, "B": 1})[1:], np.float32) for name in names}
    return {**drawn, **guidance_inputs(manifest.guidance, manifest.guidance.default)}


@contextmanager
def _process() -> Iterator[Pool]:
    """A fresh process, which leaves Ctrl-C to this one."""
    with multiprocessing.get_context("spawn").Pool(1, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
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
