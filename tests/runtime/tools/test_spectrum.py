"""ddit-run spectrum: the power law of a model's latents."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.fft import idctn

from conftest import run
from ddit.runtime import Bundle
from ddit.runtime.cli import main
from ddit.runtime.errors import UsageError
from ddit.runtime.tools.spectrum import measure


@pytest.mark.parametrize("shape", [(64, 64), (48, 80)])
def test_a_known_power_law_is_found(shape):
    rng = np.random.default_rng(0)
    height, width = shape
    radius = np.hypot(np.arange(height)[:, None] / height, np.arange(width) / width) * min(shape) / 2
    power = 200 * np.maximum(radius, 0.5) ** -1.9
    latents = [
        idctn(np.sqrt(power) * rng.standard_normal((16, *shape)), norm="ortho", axes=(1, 2)).astype(np.float32)
        for _ in range(4)
    ]
    found = measure(latents)
    assert found.spectrum.amplitude == pytest.approx(200, rel=0.2)  # few coefficients lie in the lowest band
    assert found.spectrum.exponent == pytest.approx(1.9, abs=0.05)
    assert found.frequencies == tuple(map(float, range(1, min(shape) // 2)))


def test_a_small_latent_has_no_spectrum():
    with pytest.raises(UsageError, match="measure larger pictures"):
        measure([np.ones((4, 8, 8), np.float32)])


@pytest.fixture
def bundle(tiny_bundle, tmp_path) -> Path:
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue star\n")
    return shutil.copytree(tiny_bundle, tmp_path / "a.bundle")


def test_the_spectrum_is_measured_and_kept(bundle):
    before = Bundle.open(bundle).manifest
    size = ("--steps", 2, "--height", 128, "--width", 128, "--prompts", bundle.parent / "prompts.txt")
    shown = run(main, "spectrum", bundle, *size, "--dry-run", "--json")
    assert shown.exit_code == 0, shown.stderr
    assert Bundle.open(bundle).manifest == before
    result = run(main, "spectrum", bundle, *size)
    assert result.exit_code == 0, result.stderr
    assert "kept in" in result.stderr
    kept = Bundle.open(bundle).manifest.spectrum
    assert kept is not None
    assert kept.model_dump() == json.loads(shown.stdout)["spectrum"]
    assert kept != before.spectrum


def test_a_file_without_prompts_is_refused(bundle):
    (bundle.parent / "none.txt").write_text("\n")
    result = run(main, "spectrum", bundle, "--prompts", bundle.parent / "none.txt")
    assert result.exit_code == 2
    assert "has no prompts" in result.stderr
