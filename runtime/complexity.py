"""The complexity map: where in a picture, and when in a run, the latent's path had detail.

It is made of what the schedule sees: the deviation of the third difference inside the patches of the finest coarse
level, as a multiple of a smooth picture's at that noise level where the bundle knows that
(`ddit.runtime.policies.smooth`).
Where it is high, the picture was still forming in ways that a coarse patch cannot follow.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]


@dataclass
class Complexity:
    """Deviations of one sample, summed up over a run."""

    patch: int  # in latent pixels
    total: FloatArray | None = field(default=None, repr=False)  # (…, H/p, W/p), sum over the steps
    weighted: FloatArray | None = field(default=None, repr=False)  # the same, each step's times its number

    def add(self, step: int, deviation: FloatArray) -> None:
        """Take a step's deviations (H/p, W/p), of a clip (F, H/p, W/p)."""
        self.total = deviation if self.total is None else self.total + deviation
        weighted = np.float32(step) * deviation
        self.weighted = weighted if self.weighted is None else self.weighted + weighted

    def where(self) -> FloatArray:
        """Detail of every patch, as a share of the picture's mean (H/p, W/p); empty for a run that is too short."""
        if self.total is None:
            return np.zeros((0, 0), dtype=np.float32)
        mean: FloatArray = self.total / max(float(self.total.mean()), 1e-30)
        return mean

    def when(self) -> FloatArray:
        """The mean step at which every patch had its detail (H/p, W/p)."""
        if self.total is None or self.weighted is None:
            return np.zeros((0, 0), dtype=np.float32)
        mean: FloatArray = (self.weighted / np.maximum(self.total, 1e-30)).astype(np.float32)
        return mean

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the trace, with as many digits as say something."""
        rows = {name: np.round(values, 3).tolist() for name, values in (("where", self.where()), ("when", self.when()))}
        return {"patch": self.patch, **rows}
