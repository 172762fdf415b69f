"""Measure a bundle's levels: milliseconds of a denoising step, tokens, and peak memory."""

import multiprocessing
import resource
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from ddit.runtime.pipeline import Pipeline
from ddit.runtime.schedule import Fixed


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


def bench_level(
    path: Path, backend: str, threads: int | None, patch: int, height: int | None, width: int | None, repeat: int
) -> Measurement:
    """Time ``repeat`` steps of one level, after two that warm up. Meant for a process of its own: see `bench`."""
    pipeline = Pipeline.open(path, backend=backend, threads=threads)
    warm_up = 2
    result = pipeline("bench", schedule=Fixed((patch,) * (warm_up + repeat)), height=height, width=width)
    trace = result.trace
    times = [record.milliseconds for record in trace.steps[warm_up:]]
    on_gpu = pipeline.backend.memory_used()
    scale = pipeline.bundle.manifest.latent.downscale * patch
    return Measurement(
        level=patch,
        image_tokens=(trace.height // scale) * (trace.width // scale),
        text_tokens=pipeline.bundle.manifest.tokenizers["t5"].length,
        milliseconds=statistics.median(times),
        fastest=min(times),
        slowest=max(times),
        peak_memory_mb=peak_memory_mb(),
        gpu_memory_mb=None if on_gpu is None else on_gpu / 1e6,
    )


def bench(
    path: Path,
    backend: str,
    threads: int | None,
    patches: tuple[int, ...],
    *,
    height: int | None,
    width: int | None,
    repeat: int,
) -> list[Measurement]:
    """Measure levels one after another, each in a fresh process, so that peak memory is the level's own."""
    context = multiprocessing.get_context("spawn")
    measurements = []
    for patch in patches:
        with context.Pool(1) as pool:
            measurements.append(pool.apply(bench_level, (path, backend, threads, patch, height, width, repeat)))
    return measurements


def peak_memory_mb() -> float:
    """The most memory that this process has held so far, in MB (10⁶ bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
