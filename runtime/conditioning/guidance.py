"""Guidance: how strongly a picture follows its prompt, for models that were distilled to take the scale as an input."""

import numpy as np
from numpy.typing import NDArray

from ddit.runtime.bundle.manifest import MAX_GUIDANCE, GuidanceInfo
from ddit.runtime.errors import UsageError


def guidance_scale(info: GuidanceInfo, asked: float | None) -> float:
    """The scale of a run. Raises `UsageError` where a model takes none and one was asked for."""
    if asked is not None and not info.embedded and asked != info.default:
        raise UsageError("this model takes no guidance scale (it was not distilled for one); leave it out")
    scale = info.default if asked is None else asked
    if not -MAX_GUIDANCE <= scale <= MAX_GUIDANCE:
        raise UsageError(f"guidance must lie between {-MAX_GUIDANCE:g} and {MAX_GUIDANCE:g}, not {scale}")
    return scale


def guidance_inputs(info: GuidanceInfo, scale: float) -> dict[str, NDArray[np.float32]]:
    """What the levels are told of it, for one sample: a scalar array, or nothing."""
    return {"guidance": np.asarray(scale, dtype=np.float32)} if info.embedded else {}
