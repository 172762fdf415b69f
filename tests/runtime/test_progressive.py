"""Runs on a latent that grows, beside a plain loop over the bundle's engines and SciPy's cosine transform."""

from fractions import Fraction

import numpy as np
import pytest
from scipy.fft import dctn, idctn

from ddit.runtime import Pipeline, Request
from ddit.runtime.conditioning.positions import level_tables
from ddit.runtime.errors import UsageError

SIZE = {"height": 256, "width": 128}
PROMPT, SEED, STEPS = "a red circle", 3, 10


@pytest.fixture(scope="module")
def pipeline(tiny_bundle) -> Pipeline:
    return Pipeline.open(tiny_bundle, backend="cpu")


def plain_loop(pipeline: Pipeline, grows_at: dict[int, tuple[int, int]], start: tuple[int, int]) -> np.ndarray:
    """Euler steps at the native level; before the step of a number the latent grows to a size."""
    manifest = pipeline.bundle.manifest
    sigmas = pipeline.sigmas(STEPS, **SIZE).astype(float)
    conditions = pipeline.encode([PROMPT])
    latent = np.random.default_rng(SEED).standard_normal((manifest.latent.channels, *start), dtype=np.float32)
    grown = 0
    for step in range(STEPS):
        sigma = sigmas[step]
        if size := grows_at.get(step):
            grown += 1
            rng = np.random.default_rng([SEED, grown])
            noise = rng.standard_normal((len(latent), *size), dtype=np.float32).astype(float)
            ratio = np.sqrt(np.prod(size) / np.prod(latent.shape[1:]))
            coefficients = sigma * noise
            coefficients[:, : latent.shape[1], : latent.shape[2]] = dctn(latent, norm="ortho", axes=(1, 2))
            factor = ratio / (1 + (ratio - 1) * sigma)
            latent, sigma = factor * idctn(coefficients, norm="ortho", axes=(1, 2)), sigma * factor
        height, width = latent.shape[1:]
        tables = level_tables(manifest.positions, manifest.latent, 2, 2, {"H": height, "W": width})
        velocity = pipeline.backend.engine("level-2").run(
            {
                "latent": latent[None].astype(np.float32),
                "timestep": np.array([sigma], np.float32),
                "guidance": np.array([3.5], np.float32),
                **conditions,
                **tables,
            }
        )["velocity"][0]
        latent = latent + (sigmas[step + 1] - sigma) * velocity
    return latent


def first_at_most(sigmas: np.ndarray, level: float) -> int:
    return int(np.argmax(sigmas <= level))


def level_of(spectrum, frequency: float, delta: float) -> float:
    """t* as the paper writes it."""
    power = spectrum.amplitude * frequency**-spectrum.exponent
    return 1 / (1 + np.sqrt(delta / (power * (1 + power - delta))))


@pytest.mark.parametrize("delta", [0.05, 0.5])
def test_a_run_is_the_plain_loop(pipeline, delta):
    spectrum = pipeline.bundle.manifest.spectrum
    sigmas = pipeline.sigmas(STEPS, **SIZE)
    grows = first_at_most(sigmas, level_of(spectrum, 0.5 * 16 / 2, delta))
    assert 0 < grows < STEPS
    result = pipeline(PROMPT, seed=SEED, steps=STEPS, schedule=f"progressive:delta={delta}", guidance=3.5, **SIZE)
    expected = plain_loop(pipeline, {grows: (32, 16)}, (16, 8))
    np.testing.assert_allclose(result.latent, expected, atol=2e-5 * np.abs(expected).max())
    assert [record.scale for record in result.trace.steps] == [0.5] * grows + [1.0] * (STEPS - grows)
    assert result.trace.steps[0].size == (128, 64)
    factor = 2 / (1 + sigmas[grows])
    assert result.trace.steps[grows].sigma == pytest.approx(factor * sigmas[grows], rel=1e-6)
    assert result.image.size == (128, 256)
