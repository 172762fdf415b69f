"""Previews: what the decoder does to colours is found from its own pictures."""

import numpy as np
from PIL import Image

from ddit.runtime.serving.preview import Colours

RNG = np.random.default_rng(1)
MIXING = RNG.normal(0, 20, (4, 3))  # what a linear decoder makes of four channels
GREY = np.array([120.0, 130.0, 110.0])


def decode(latent: np.ndarray) -> Image.Image:
    """A decoder that is linear, eight pixels a latent pixel."""
    colours = np.clip(np.round(np.einsum("chw,cd->hwd", latent, MIXING) + GREY), 0, 255).astype(np.uint8)
    return Image.fromarray(np.kron(colours, np.ones((8, 8, 1), np.uint8)))


def latent(height: int, width: int) -> np.ndarray:
    return RNG.uniform(-1, 1, (4, height, width)).astype(np.float32)


def test_a_linear_decoder_is_found_from_one_picture():
    colours = Colours()
    assert colours(latent(4, 4)) is None, "nothing is known yet"
    first = latent(32, 24)
    colours.learn(first, decode(first))
    other = latent(16, 40)
    preview = colours(other)
    wanted = np.asarray(decode(other).resize((40, 16), Image.Resampling.BOX), np.int16)
    assert preview.shape == (16, 40, 3)
    assert np.abs(preview.astype(np.int16) - wanted).max() <= 1


def test_a_plain_picture_teaches_a_colour_and_breaks_nothing():
    colours = Colours()
    plain = np.zeros((4, 8, 8), np.float32)
    colours.learn(plain, decode(plain))
    assert np.abs(colours(plain).astype(np.int16) - GREY).max() <= 1
    assert np.isfinite(colours(latent(8, 8))).all()
    varied = latent(32, 32)
    colours.learn(varied, decode(varied))
    wanted = np.asarray(decode(varied).resize((32, 32), Image.Resampling.BOX), np.int16)
    assert np.abs(colours(varied).astype(np.int16) - wanted).max() <= 2
