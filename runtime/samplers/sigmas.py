"""Noise levels of flow-matching sampling, equal to diffusers' schedulers, and what a model is told of them."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ddit.runtime import shapes
from ddit.runtime.bundle import Manifest
from ddit.runtime.bundle.manifest import FlowMatchEulerInfo, SamplerInfo, UniPCInfo

FloatArray = NDArray[np.float32]

BELOW_ONE = 1e-6  # UniPC looks at the logarithm of 1 − σ


def flow_shift(sampler: FlowMatchEulerInfo, image_tokens: int) -> float:
    """FLUX's resolution-dependent shift μ, linear in the native image tokens (diffusers' `calculate_shift`)."""
    slope = (sampler.max_shift - sampler.base_shift) / (sampler.max_image_seq_len - sampler.base_image_seq_len)
    return sampler.base_shift + slope * (image_tokens - sampler.base_image_seq_len)


def sigmas(sampler: SamplerInfo, steps: int, image_tokens: int) -> FloatArray:
    """Noise levels ``(steps + 1,)`` float32, from 1 down to 0.

    ``image_tokens`` counts patches at the native level, whatever level a step runs at.
    """
    return np.append(_levels(sampler, steps, image_tokens), 0.0).astype(np.float32)


def timesteps(sampler: SamplerInfo, steps: int, image_tokens: int) -> FloatArray:
    """The noise levels ``(steps,)`` that the model is told.

    From the levels in float64, as diffusers has them: one that is just below a whole step of the training is cut to the
    step before.
    """
    levels = _levels(sampler, steps, image_tokens)
    return np.array([model_timestep(sampler, level) for level in levels], np.float32)


def model_timestep(sampler: SamplerInfo, sigma: float) -> float:
    """The noise level that the model is told: UniPC's scheduler cuts it to whole steps of the training.

    >>> model_timestep(UniPCInfo(shift=3, order=2, train_steps=1000, steps=50), 0.75049)
    0.75
    """
    if sampler.kind != "flow_unipc":
        return sigma
    return float(int(sigma * sampler.train_steps) / sampler.train_steps)


def _levels(sampler: SamplerInfo, steps: int, image_tokens: int) -> NDArray[np.float64]:
    return _unipc(sampler, steps) if sampler.kind == "flow_unipc" else _euler(sampler, steps, image_tokens)


def _euler(sampler: FlowMatchEulerInfo, steps: int, image_tokens: int) -> NDArray[np.float64]:
    """Those of `FlowMatchEulerDiscreteScheduler`.

    With dynamic shifting σ → s σ / (1 + (s − 1) σ) with s = e^μ (SD3, arXiv 2403.03206, section 5.3.2), else s is the
    scheduler's constant.
    """
    last = 1.0 / steps if sampler.smallest is None else sampler.smallest
    plain = np.linspace(1.0, last, steps, dtype=np.float64).astype(np.float32).astype(np.float64)
    return _shifted(plain, np.exp(flow_shift(sampler, image_tokens)) if sampler.use_dynamic_shifting else sampler.shift)


def _unipc(sampler: UniPCInfo, steps: int) -> NDArray[np.float64]:
    """Those of `UniPCMultistepScheduler` with ``use_flow_sigmas``."""
    levels = _shifted(np.linspace(1.0, 1.0 / sampler.train_steps, steps + 1)[:-1], sampler.shift)
    levels[0] = min(levels[0], 1 - BELOW_ONE)
    return levels


def _shifted(levels: NDArray[np.float64], shift: float) -> NDArray[np.float64]:
    return shift * levels / (1.0 + (shift - 1.0) * levels)


def run_sigmas(manifest: Manifest, steps: int, sizes: Mapping[str, int]) -> FloatArray:
    """The noise levels of a run at a size in symbols (latent ``H`` and ``W``)."""
    return sigmas(manifest.sampler, steps, shapes.image_tokens(manifest.latent, manifest.native, sizes))


def run_timesteps(manifest: Manifest, steps: int, sizes: Mapping[str, int]) -> FloatArray:
    """What the model is told in a run at a size in symbols."""
    return timesteps(manifest.sampler, steps, shapes.image_tokens(manifest.latent, manifest.native, sizes))


def noise(seed: int, shape: tuple[int, ...]) -> FloatArray:
    """The starting latent of a seed: standard normal float32 from NumPy's PCG64, the same on every machine."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
