"""What decoding a clip takes; imported by a process of its own, which must not load torch for it."""

from pathlib import Path

import numpy as np

from ddit.runtime import Pipeline
from ddit.runtime.tools.bench import peak_memory_mb


def decode(bundle: Path, frames: int) -> float:
    """Peak memory in MB of a process that decodes a clip of 256×256."""
    pipeline = Pipeline.open(bundle, backend="cpu")
    shape = (1, 16, (frames - 1) // 4 + 1, 32, 32)
    (clip,) = pipeline.decode(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    assert len(clip) == frames
    return peak_memory_mb()
