"""What a bundle says of its policies: a calibration for the run's steps, size and backend, or its defaults."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddit.runtime import shapes
from ddit.runtime.bundle import Manifest
from ddit.runtime.errors import UsageError
from ddit.runtime.policies.adaptive import Adaptive
from ddit.runtime.policies.base import Policy
from ddit.runtime.policies.dynamic import Dynamic
from ddit.runtime.policies.parse import Choices, parse_schedule
from ddit.runtime.policies.progressive import Stage
from ddit.runtime.policies.smooth import smooth_at
from ddit.runtime.shapes import Size


def bundle_policy(text: str, manifest: Manifest, sigmas: NDArray[np.float32], *, size: Size, backend: str) -> Policy:
    """A policy from its written form; the bundle gives what it leaves unsaid. Raises `UsageError`.

    ``sigmas`` are the run's noise levels, one more than there are steps.
    """
    run: dict[str, Any] = {"steps": len(sigmas) - 1, "size": size, "backend": backend}
    info, known = manifest.dynamic(**run), manifest.prediction(**run)
    coarse = tuple(patch for patch in manifest.coarse if patch <= (info.coarsest or patch))
    smooth = smooth_at(info.smooth, sigmas) if info.smooth else None
    adaptive = Adaptive(known.tolerance, known.order)
    default = Dynamic(manifest.native, coarse, info.tau, info.rho, info.warmup, info.hold, smooth)
    symbols = shapes.to_symbols(manifest.latent, size.by_name())
    stages = partial(growing_stages, manifest, symbols)
    choices = Choices(
        manifest.patches,
        manifest.native,
        default,
        adaptive,
        gate=manifest.gate.coefficients if manifest.gate else (),
        path=manifest.path(steps=len(sigmas) - 1, size=size),
        spectrum=manifest.spectrum,
        stages=stages,
        euler=manifest.sampler.kind == "flow_match_euler",
    )
    return parse_schedule(text, choices)


def growing_stages(manifest: Manifest, symbols: Mapping[str, int], scales: Sequence[Fraction]) -> tuple[Stage, ...]:
    """The sizes of rising scales and the full size after them, for a latent of the size that ``symbols`` gives.

    Raises `UsageError` for scales at which the levels have no size of their own.
    """
    rising = (*scales, Fraction(1))
    sides = {shapes.SYMBOLS[axis.name]: axis.name for axis in manifest.latent.sides}
    sizes = [
        {name: scaled[symbol] for symbol, name in sides.items()}
        for scaled in (shapes.scaled(manifest.latent, manifest.patches, symbols, scale) for scale in rising)
    ]
    for number, (small, large) in enumerate(pairwise(sizes)):
        if same := [name for name in small if small[name] >= large[name]]:
            one, other = rising[number : number + 2]
            raise UsageError(f"the scales {one} and {other} have the same {same[0]} here; leave one out")
    full = sizes[-1]
    shares = [min(size[name] / full[name] for name in full) for size in sizes]
    return tuple(
        Stage(scale, share * min(full.values()) / 2, prod(size.values()))
        for scale, share, size in zip(rising, shares, sizes, strict=True)
    )


def smooth_curves(
    manifest: Manifest, sigmas: NDArray[np.float32], *, size: Size, backend: str
) -> Mapping[int, Sequence[float]]:
    """By coarse patch the statistic of smooth pictures after every step; nothing where the bundle does not know it."""
    info = manifest.dynamic(steps=len(sigmas) - 1, size=size, backend=backend)
    return smooth_at(info.smooth, sigmas) if info.smooth else {}
