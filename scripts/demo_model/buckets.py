"""The picture sizes that the demo model is trained at, and what follows from a size."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from demo_model.parts import PATCH, TEXT_LENGTH

DOWNSCALE = 8  # pixels of a latent's pixel


@dataclass(frozen=True)
class Bucket:
    """A picture size in pixels; sides are multiples of 64, so that patches of 2, 4 and 8 divide the latent's."""

    height: int
    width: int
    weight: float = 1.0  # of the training steps

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.height, self.width

    @property
    def latent(self) -> tuple[int, int]:
        """Height and width in pixels of the latent."""
        return self.height // DOWNSCALE, self.width // DOWNSCALE

    @property
    def tokens(self) -> int:
        """Image tokens at the native level."""
        return (self.latent[0] // PATCH) * (self.latent[1] // PATCH)

    @property
    def mu(self) -> float:
        """The logarithm of `shift`, linear in the tokens."""
        return float(calculate_shift(self.tokens))

    @property
    def shift(self) -> float:
        """How FLUX's scheduler shifts noise levels at this size: σ → s σ / (1 + (s − 1) σ)."""
        return math.exp(self.mu)

    def rows(self, batch: int) -> int:
        """How many pictures of this size have the tokens, text included, of ``batch`` pictures of 256×256."""
        return max(2, round(batch * (256 + TEXT_LENGTH) / (self.tokens + TEXT_LENGTH)))


def _both_ways(short: int, long: int) -> tuple[Bucket, Bucket]:
    return Bucket(short, long), Bucket(long, short)


# every side from 128 to 384 occurs in both directions; 256×256, the optimum, takes a third of the steps
BUCKETS = (
    Bucket(256, 256, 7.0),
    *(Bucket(side, side) for side in (128, 192, 320, 384)),
    *_both_ways(128, 192),
    *_both_ways(192, 256),
    *_both_ways(192, 320),
    *_both_ways(256, 384),
    *_both_ways(128, 384),
)
SHOWN = tuple(bucket for bucket in BUCKETS if bucket.size in {(128, 128), (192, 320), (384, 256)})  # to be looked at
TINY_BUCKETS = (Bucket(64, 64), *_both_ways(64, 128))  # a smoke test's


def bucket_of(step: int, buckets: Sequence[Bucket]) -> Bucket:
    """A training step's bucket. It follows from the step alone, so that all processes have the same work to do."""
    return random.Random(step).choices(buckets, [bucket.weight for bucket in buckets])[0]
