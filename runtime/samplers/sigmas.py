"""Noise levels of flow-matching sampling, equal to diffusers' `FlowMatchEulerDiscreteScheduler` for FLUX."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ddit.runtime import shapes
from ddit.runtime.bundle import Manifest
from ddit.runtime.bundle.manifest import FlowMatchEulerInfo

FloatArray = NDArray[np.float32]


def flow_shift(sampler: FlowMatchEulerInfo, image_tokens: int) -> float:
    """FLUX's resolution-dependent shift μ, linear in the native image tokens (diffusers' `calculate_shift`)."""
    slope = (sampler.max_shift - sampler.base_shift) / (sampler.max_image_seq_len - sampler.base_image_seq_len)
    return sampler.base_shift + slope * (image_tokens - sampler.base_image_seq_len)


def sigmas(sampler: FlowMatchEulerInfo, steps: int, image_tokens: int) -> FloatArray:
    """Noise levels ``(steps + 1,)`` float32, from 1 down to 0.

    ``image_tokens`` counts patches at the native level, whatever level a step runs at. With dynamic shifting
    σ → s σ / (1 + (s − 1) σ) with s = e^μ (SD3, arXiv 2403.03206, section 5.3.2), else s is the scheduler's constant.
    """
    plain = np.linspace(1.0, 1.0 / steps, steps, dtype=np.float64).astype(np.float32).astype(np.float64)
    shift = np.exp(flow_shift(sampler, image_tokens)) if sampler.use_dynamic_shifting else sampler.shift
    shifted = shift * plain / (1.0 + (shift - 1.0) * plain)
    return np.append(shifted, 0.0).astype(np.float32)


def run_sigmas(manifest: Manifest, steps: int, sizes: Mapping[str, int]) -> FloatArray:
    """The noise levels of a run at a size in symbols (latent ``H`` and ``W``)."""
    return sigmas(manifest.sampler, steps, shapes.image_tokens(manifest.latent, manifest.native, sizes))


def noise(seed: int, shape: tuple[int, ...]) -> FloatArray:
    """The starting latent of a seed: standard normal float32 from NumPy's PCG64, the same on every machine."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
