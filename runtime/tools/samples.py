"""Seeded inputs of graphs, of the magnitude that they have in use: for comparing and for timing them."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ddit.runtime.bundle.manifest import TensorSpec

FloatArray = NDArray[np.float32]

# numbers that are given for every sample; other float32 inputs are standard normal
RANGES = {
    "timestep": (0.05, 1.0),
    "dt": (-0.1, -0.01),
    "guidance": (1.0, 2.0),
    "carry": (0.0, 1.0),
    "prediction": (-1.0, 2.0),
    "correction": (-0.1, 0.1),
    "gain": (1.0, 2.0),
    "solver": (-0.2, 0.4),
}
VOCABULARY = 4  # token ids that every vocabulary has


def sample_inputs(
    inputs: Sequence[TensorSpec],
    sizes: Mapping[str, int],
    *,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
    tables: Mapping[str, FloatArray] | None = None,
) -> dict[str, FloatArray | NDArray[np.int64]]:
    """Inputs of a graph by name, the same for a seed on every machine.

    Args:
        inputs: the graph's signature.
        sizes: the values of the shapes' symbols.
        vocabulary: token ids are below it. The highest stands once or more in every row, after the first place: it
            ends a text for CLIP, which pools there.
        tables: inputs that are not random, by name: a level's rotary tables at these sizes, from
            `ddit.runtime.conditioning.positions.level_tables`.
    """
    rng = np.random.default_rng(seed)
    known = tables or {}
    samples: dict[str, FloatArray | NDArray[np.int64]] = {}
    for spec in inputs:
        shape = spec.resolve(sizes)
        if spec.name in known:
            samples[spec.name] = known[spec.name]
        elif spec.dtype == "int64":
            samples[spec.name] = _token_ids(rng, vocabulary, shape)
        elif spec.name in RANGES:
            samples[spec.name] = rng.uniform(*RANGES[spec.name], shape).astype(np.float32)
        else:
            samples[spec.name] = rng.standard_normal(shape, dtype=np.float32)
    return samples


def _token_ids(rng: np.random.Generator, vocabulary: int, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Token ids (B, tokens)."""
    ids = rng.integers(0, vocabulary, shape)
    rows, length = shape
    ids[np.arange(rows), rng.integers(min(1, length - 1), length, rows)] = vocabulary - 1
    return ids
