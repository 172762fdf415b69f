"""The grow graph, beside SciPy's cosine transform."""

import numpy as np
import pytest
import torch
from scipy.fft import dct, dctn, idctn

from ddit.exporter.steps.growing import GrowGraph
from ddit.runtime.bundle.names import GROWING_TABLES
from ddit.runtime.samplers.growing import dct_matrix, growing_tables, in_corner, noise_coefficients, small_noise


@pytest.mark.parametrize("size", [1, 2, 7, 16, 33])
def test_the_matrix_is_scipy_s_transform(size):
    np.testing.assert_allclose(dct_matrix(size), dct(np.eye(size), type=2, norm="ortho", axis=0), atol=1e-13)
    np.testing.assert_allclose(dct_matrix(size) @ dct_matrix(size).T, np.eye(size), atol=1e-12)


@pytest.mark.parametrize(
    ("small", "full"), [((4, 4), (8, 8)), ((5, 3), (11, 9)), ((1, 7), (2, 8)), ((6, 12), (16, 24))]
)
def test_growing_is_scipy_s(small, full):
    rng = np.random.default_rng(0)
    latent, noise = rng.standard_normal((2, 3, *small)), rng.standard_normal((2, 3, *full))
    sigma, gain = np.array([0.7, 0.2]), np.array([1.3, 1.7])
    coefficients = sigma[:, None, None, None] * noise
    coefficients[:, :, : small[0], : small[1]] = dctn(latent, norm="ortho", axes=(2, 3))
    expected = gain[:, None, None, None] * idctn(coefficients, norm="ortho", axes=(2, 3))
    padded = np.stack([in_corner(one, (3, *full)) for one in latent])
    tables = growing_tables(small, full)
    assert tuple(tables) == GROWING_TABLES
    inputs = [padded, noise, sigma, gain, *tables.values()]
    found = GrowGraph()(*(torch.tensor(value, dtype=torch.float64) for value in inputs))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_growing_keeps_noise_noise_and_a_picture_the_picture():
    """White noise stays white, and a constant picture grows to the constant times κ·r/… as the equations say."""
    small, full = (16, 16), (32, 32)
    tables = [torch.tensor(value) for value in growing_tables(small, full).values()]
    white = torch.randn(1, 4, 16, 16)
    padded = torch.tensor(in_corner(white[0].numpy(), (4, *full)))[None]
    grown = GrowGraph()(padded, torch.randn(1, 4, *full), torch.ones(1), torch.ones(1), *tables)
    assert grown.std().item() == pytest.approx(1, abs=0.05)
    flat = torch.tensor(in_corner(np.ones((4, *small), np.float32), (4, *full)))[None]
    grown = GrowGraph()(flat, torch.randn(1, 4, *full), torch.zeros(1), torch.full((1,), 2.0), *tables)
    torch.testing.assert_close(grown, torch.ones(1, 4, *full), atol=1e-5, rtol=0)


def test_all_sizes_have_the_noise_of_the_full_size():
    full = np.random.default_rng(7).standard_normal((4, 16, 12), dtype=np.float32)
    coefficients = noise_coefficients(7, full.shape)
    np.testing.assert_allclose(coefficients, dctn(full, norm="ortho", axes=(1, 2)), atol=1e-5)
    small = small_noise(coefficients, (4, 8, 5))
    np.testing.assert_allclose(small, idctn(coefficients[:, :8, :5], norm="ortho", axes=(1, 2)), atol=1e-5)
    tables = growing_tables((8, 5), (16, 12)).values()
    inputs = [in_corner(small, full.shape)[None], coefficients[None], np.ones(1), np.ones(1), *tables]
    grown = GrowGraph()(*(torch.tensor(value, dtype=torch.float32) for value in inputs))
    np.testing.assert_allclose(grown[0], full, atol=1e-5)
