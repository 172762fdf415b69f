"""Guidance: how strongly a picture follows its prompt.

A model was distilled to take the scale as an input; or every step runs its level twice, with the prompt and with a
negative one, and goes away from the latter (classifier-free guidance, arXiv 2207.12598); or there is none.
"""

import numpy as np
from numpy.typing import NDArray

from ddit.runtime.bundle.manifest import MAX_GUIDANCE, GuidanceInfo
from ddit.runtime.errors import UsageError


def guidance_scale(info: GuidanceInfo, asked: float | None) -> float:
    """The scale of a run. Raises `UsageError` where a model takes none and one was asked for."""
    if asked is not None and info.kind == "none" and asked != info.default:
        raise UsageError("this model takes no guidance scale (it was not distilled for one); leave it out")
    scale = info.default if asked is None else asked
    if not -MAX_GUIDANCE <= scale <= MAX_GUIDANCE:
        raise UsageError(f"guidance must lie between {-MAX_GUIDANCE:g} and {MAX_GUIDANCE:g}, not {scale}")
    return scale


def is_guided(info: GuidanceInfo, scale: float) -> bool:
    """Whether a step runs its level twice. As in diffusers, a scale of 1 and below needs no negative prompt."""
    return info.two_passes and scale > 1


def guidance_inputs(info: GuidanceInfo, scale: float) -> dict[str, NDArray[np.float32]]:
    """What the graphs are told of it, for one sample: a scalar array, or nothing."""
    told = info.embedded or is_guided(info, scale)
    return {"guidance": np.asarray(scale, dtype=np.float32)} if told else {}
