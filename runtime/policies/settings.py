"""What a bundle says of its policies: a calibration for the run's steps, size and backend, or its defaults."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddit.runtime.bundle import Manifest
from ddit.runtime.policies.adaptive import Adaptive
from ddit.runtime.policies.base import Policy
from ddit.runtime.policies.dynamic import Dynamic
from ddit.runtime.policies.parse import Choices, parse_schedule
from ddit.runtime.policies.smooth import smooth_at


def bundle_policy(
    text: str, manifest: Manifest, sigmas: NDArray[np.float32], *, height: int, width: int, backend: str
) -> Policy:
    """A policy from its written form; the bundle gives what it leaves unsaid. Raises `UsageError`.

    ``sigmas`` are the run's noise levels, one more than there are steps; ``height`` and ``width`` count pixels.
    """
    run: dict[str, Any] = {"steps": len(sigmas) - 1, "height": height, "width": width, "backend": backend}
    info, known = manifest.dynamic(**run), manifest.prediction(**run)
    coarse = tuple(patch for patch in manifest.coarse if patch <= (info.coarsest or patch))
    smooth = smooth_at(info.smooth, sigmas) if info.smooth else None
    adaptive = Adaptive(known.tolerance, known.order)
    default = Dynamic(manifest.native, coarse, info.tau, info.rho, info.warmup, info.hold, smooth)
    gate = manifest.gate.coefficients if manifest.gate else ()
    path = manifest.path(steps=len(sigmas) - 1, height=height, width=width)
    return parse_schedule(text, Choices(manifest.patches, manifest.native, default, adaptive, gate, path))


def smooth_curves(
    manifest: Manifest, sigmas: NDArray[np.float32], *, height: int, width: int, backend: str
) -> Mapping[int, Sequence[float]]:
    """By coarse patch the statistic of smooth pictures after every step; nothing where the bundle does not know it."""
    info = manifest.dynamic(steps=len(sigmas) - 1, height=height, width=width, backend=backend)
    return smooth_at(info.smooth, sigmas) if info.smooth else {}
