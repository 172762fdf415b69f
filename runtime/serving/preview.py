"""Small previews of latents, without the decoder: one pixel a latent pixel.

A latent's channels say, nearly linearly, what colour the picture has there. The weights are fitted by least squares to
pictures that were decoded anyway, so that no model needs weights of its own for this.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddit.runtime.backends.base import FloatArray

ENOUGH = 16  # pictures that it learns from
RIDGE = 1e-3  # keeps the weights of channels that have not varied yet small, as a share of the channels' mean square


class Colours:
    """What colours the channels of a bundle's latents stand for. Belongs to one thread."""

    def __init__(self) -> None:
        self._pictures = 0
        self._weights: NDArray[np.float64] | None = None  # (C + 1, 3), the last row for no channel
        self._products: NDArray[np.float64] | float = 0.0  # Σ xᵀx and Σ xᵀy of the pixels so far
        self._wanted: NDArray[np.float64] | float = 0.0

    def learn(self, latent: FloatArray, picture: Image.Image) -> None:
        """Take a latent (C, H, W) and the picture that the decoder made of it; after `ENOUGH` of them do nothing.

        Of a clip's (C, F, H, W) the first frame counts, which its decoder makes of the latent's first frame alone.
        """
        if self._pictures == ENOUGH:
            return
        self._pictures += 1
        latent = _first_frame(latent)
        _, height, width = latent.shape
        small = np.asarray(picture.convert("RGB").resize((width, height), Image.Resampling.BOX), np.float64)
        pixels = _pixels(latent)
        self._products = self._products + pixels.T @ pixels
        self._wanted = self._wanted + pixels.T @ small.reshape(-1, 3)
        ridge = RIDGE * np.trace(self._products) / len(self._products) * np.eye(len(self._products))
        self._weights = np.linalg.solve(self._products + ridge, self._wanted)

    def __call__(self, latent: FloatArray) -> NDArray[np.uint8] | None:
        """A latent (C, H, W), or a clip's first frame, as (H, W, 3); None before the first was learnt from."""
        if self._weights is None:
            return None
        latent = _first_frame(latent)
        _, height, width = latent.shape
        colours = _pixels(latent) @ self._weights
        return np.clip(np.round(colours), 0, 255).astype(np.uint8).reshape(height, width, 3)


def _first_frame(latent: FloatArray) -> FloatArray:
    return latent[:, 0] if latent.ndim == 4 else latent


def _pixels(latent: FloatArray) -> NDArray[np.float64]:
    """A row a pixel: its channels, and 1."""
    rows = latent.reshape(len(latent), -1).T.astype(np.float64)
    return np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
