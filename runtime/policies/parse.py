"""Policies in writing, as ``--schedule`` takes them.

native                          every step at the native level
fixed:8x10,4x20,2x20            ten steps at level 8, then twenty at 4, then twenty at 2
dynamic                         levels by content (DDiT), with the bundle's settings
dynamic:tau=0.002,rho=0.4       the same with settings of one's own: tau, rho, warmup, hold, coarsest
dynamic:absolute=1,tau=0.001    τ as the paper has it, not a multiple of smooth pictures' statistic
adaptive                        steps are predicted where the expected error is small; the others are native
adaptive:0.02                   the same with a tolerance of one's own; or adaptive:tolerance=0.02,order=2
adams                           every step is computed, with a second-order solver: for runs of fewer steps
taylorseer:interval=4,order=2   every fourth step is computed, the others are predicted (TaylorSeer)
taylorseer:4                    the same: a number alone is the first setting
teacache:threshold=0.4          a step whose input has changed little repeats the last velocity (TeaCache)
spectralcache:threshold=0.6     the same with a threshold that follows the run, and one for each band (SpectralCache)
dpcache                         the steps that a calibration chose are computed, the others are predicted (DPCache)
dynamic+adaptive                two in one: the first picks the levels of the steps that the second does not predict
progressive                     the first steps on a latent of half the height and width; the others are native
progressive:delta=0.01          the same with settings of one's own: delta, scales (1/2, or several as in 1/4-1/2)
progressive:adaptive            the latent grows when this picture needs it, not when the model's pictures do
progressive+dynamic+adaptive    together with others, in any order
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

from ddit.runtime.bundle.manifest import MAX_STEPS, SpectrumInfo, StepPath
from ddit.runtime.errors import UsageError
from ddit.runtime.policies.adams import Adams
from ddit.runtime.policies.adaptive import Adaptive
from ddit.runtime.policies.base import DIFFERENCE_ORDER, Policy
from ddit.runtime.policies.dpcache import DPCache
from ddit.runtime.policies.dynamic import Dynamic
from ddit.runtime.policies.fixed import Fixed
from ddit.runtime.policies.native import Native
from ddit.runtime.policies.prediction import KEPT_VELOCITIES
from ddit.runtime.policies.progressive import Progressive, Stage
from ddit.runtime.policies.reuse import Reuse, Reusing
from ddit.runtime.policies.spectralcache import SpectralCache
from ddit.runtime.policies.taylorseer import TaylorSeer
from ddit.runtime.policies.teacache import TeaCache

FORMS = (
    "native, fixed:8x10,4x20,2x20 or dynamic[:tau=0.001,rho=0.4,warmup=3,hold=3,coarsest=8,absolute=0], and after a + "
    "or alone adaptive[:0.04], taylorseer[:interval=4,order=2,first=3], teacache[:threshold=0.4], "
    "spectralcache[:threshold=0.6,low=0.8,high=1.5,least=0.5,most=1.5,longest=2], dpcache "
    "or progressive[:delta=0.05,scales=1/2,adaptive]"
)
PROGRESSIVE = "progressive"
LARGEST_PART = 64  # a smaller share of a picture's sides is no picture

NO_GATE = "export it again, or choose adaptive or taylorseer"  # what to do about it


@dataclass(frozen=True)
class Choices:
    """What a bundle gives to a written policy."""

    patches: Sequence[int]
    native: int
    dynamic: Dynamic  # what ``dynamic`` leaves unsaid
    adaptive: Adaptive  # and ``adaptive``
    gate: tuple[float, ...] = ()  # coefficients of its gate's polynomial, the highest power first; empty: no gate
    path: StepPath | None = None  # of dpcache, for the run's steps and size
    spectrum: SpectrumInfo | None = None
    # the sizes of scales, the full size after them; raises `UsageError` for scales that the levels cannot run
    stages: Callable[[Sequence[Fraction]], tuple[Stage, ...]] = lambda scales: ()
    euler: bool = True  # whether the model is sampled with Euler's method


def join_schedule(schedule: str | None, reuse: str | None) -> str | None:
    """The written form of a schedule and a method of reuse that were given apart; None where neither was.

    >>> join_schedule("dynamic", "teacache:0.4")
    'dynamic+teacache:0.4'
    """
    given = [part for part in (schedule, reuse) if part is not None]
    return "+".join(given) if given else None


def parse_schedule(text: str, choices: Choices) -> Policy:
    """Make a policy from its written form. Raises `UsageError` that shows the form."""
    levels: list[Policy] = []
    reuse: list[Reuse] = []
    progressive: list[Callable[[Policy], Progressive]] = []
    for part in re.split(r"\+(?=[a-z])", text.strip()):
        kind, colon, settings = part.partition(":")
        if kind in LEVELS:
            levels.append(LEVELS[kind](settings, choices))
        elif kind in REUSE:
            reuse.append(REUSE[kind](settings, choices))
        elif kind == PROGRESSIVE:
            progressive.append(_progressive(settings, choices))
        if kind not in {*LEVELS, *REUSE, PROGRESSIVE} or (colon and not settings):
            raise UsageError(f"unknown schedule {text!r}; write {FORMS}")
    if len(levels) > 1 or len(reuse) > 1 or len(progressive) > 1:
        raise UsageError(f"{text!r} decides twice on the same thing; join at most one policy of each kind")
    chosen = levels[0] if levels else Native(choices.native)
    chosen = Reusing(chosen, reuse[0]) if reuse else chosen
    return progressive[0](chosen) if progressive else chosen


def _native(text: str, choices: Choices) -> Native:
    if text:
        raise UsageError(f"native has no settings, as in native:{text}; write {FORMS}")
    return Native(choices.native)


def _fixed(text: str, choices: Choices) -> Fixed:
    levels: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", part)
        if match is None:
            raise UsageError(f"cannot read {part!r} in the schedule; write LEVELxSTEPS, as in fixed:4x20,2x30")
        patch, count = int(match[1]), int(match[2] or 1)
        if patch not in choices.patches:
            raise UsageError(
                f"the schedule asks for level {patch}; the bundle has {', '.join(map(str, choices.patches))}"
            )
        if count > MAX_STEPS - len(levels):
            raise UsageError(f"the schedule has more than {MAX_STEPS} steps")
        levels += [patch] * count
    return Fixed(tuple(levels))


def _dynamic(text: str, choices: Choices) -> Dynamic:
    default = choices.dynamic
    readers = {"tau": float, "rho": float, "warmup": int, "hold": int, "coarsest": int, "absolute": int}
    settings = _settings(text, readers)
    coarsest = settings.pop("coarsest", None)
    if coarsest is not None:
        if coarsest < default.native:
            raise UsageError(f"coarsest must be at least the native level {default.native}, not {coarsest}")
        default = replace(
            default, coarse=tuple(patch for patch in choices.patches if default.native < patch <= coarsest)
        )
    if settings.pop("absolute", 0) and default.smooth:
        if "tau" not in settings:
            raise UsageError(
                "an absolute tau must be given, as in dynamic:absolute=1,tau=0.001: the bundle's is relative"
            )
        default = replace(default, smooth=None)
    schedule = replace(default, **settings)
    if not 0 < schedule.tau < math.inf:
        raise UsageError(f"tau must be above 0, and finite, not {schedule.tau:g}")
    if not 0 < schedule.rho < 1:
        raise UsageError(f"rho must lie between 0 and 1, not {schedule.rho:g}")
    if schedule.warmup < DIFFERENCE_ORDER:
        raise UsageError(f"warmup must be at least {DIFFERENCE_ORDER}: the third difference needs that many steps")
    if schedule.hold < 1:
        raise UsageError(f"hold must be at least 1 step, not {schedule.hold}")
    return schedule


def _adams(text: str, choices: Choices) -> Adams:
    if text:
        raise UsageError(f"adams has no settings, as in adams:{text}; write {FORMS}")
    if not choices.euler:
        raise UsageError("adams takes Euler's place, and this model has a second-order solver already; write native")
    return Adams()


def _adaptive(text: str, choices: Choices) -> Adaptive:
    policy = replace(choices.adaptive, **_settings(text, {"tolerance": float, "order": int}))
    if not 0 <= policy.tolerance < math.inf:
        raise UsageError(f"tolerance must be at least 0, and finite, not {policy.tolerance:g}")
    if not 0 <= policy.order < KEPT_VELOCITIES:
        raise UsageError(f"order must lie between 0 and {KEPT_VELOCITIES - 1}, not {policy.order}")
    return policy


def _taylorseer(text: str, choices: Choices) -> TaylorSeer:
    policy = TaylorSeer(**_settings(text, {"interval": int, "order": int, "first": int}))
    if policy.interval < 1:
        raise UsageError(f"interval must be at least 1 step, not {policy.interval}; write taylorseer:interval=4")
    if not 0 <= policy.order < KEPT_VELOCITIES:
        raise UsageError(f"order must lie between 0 and {KEPT_VELOCITIES - 1}, not {policy.order}")
    if policy.first < 1:
        raise UsageError(f"first must be at least 1 step, not {policy.first}: nothing can be predicted before")
    return policy


def _polynomial(reuse: str, choices: Choices) -> tuple[float, ...]:
    """The coefficients that a method with a gate needs. Raises `UsageError` for a bundle without one."""
    if not choices.gate:
        raise UsageError(f"{reuse} needs a gate graph, which the bundle lacks; {NO_GATE}")
    return choices.gate


def _teacache(text: str, choices: Choices) -> TeaCache:
    coefficients = _polynomial("teacache", choices)
    policy = TeaCache(coefficients, **_settings(text, {"threshold": float}))
    if not 0 <= policy.threshold < math.inf:
        raise UsageError(f"threshold must be at least 0, and finite, not {policy.threshold:g}; write teacache:0.4")
    return policy


def _spectralcache(text: str, choices: Choices) -> SpectralCache:
    coefficients = _polynomial("spectralcache", choices)
    shares = dict.fromkeys(("threshold", "low", "high", "least", "most"), float)
    policy = SpectralCache(coefficients, **_settings(text, {**shares, "longest": int}))
    for name in (*shares, "longest"):
        if not 0 <= getattr(policy, name) < math.inf:
            raise UsageError(
                f"{name} must be at least 0, and finite, not {getattr(policy, name):g}; write spectralcache:0.6"
            )
    return policy


def _dpcache(text: str, choices: Choices) -> DPCache:
    if text:
        raise UsageError(f"dpcache has no settings, as in dpcache:{text}; ddit-run calibrate --reuse dpcache chooses")
    if choices.path is None:
        raise UsageError(
            "the bundle has no path of dpcache for this number of steps and size; find one with ddit-run calibrate "
            "--reuse dpcache"
        )
    return DPCache(choices.path.steps, choices.path.computed)


def _progressive(text: str, choices: Choices) -> Callable[[Policy], Progressive]:
    """The policy without the one that decides everything else."""
    parts = [part.strip() for part in text.split(",")]
    own = "adaptive" in parts
    readers: Mapping[str, Callable[[str], Any]] = {"delta": float, "scales": _scales}
    settings = _settings(",".join(part for part in parts if part != "adaptive"), readers)
    delta, scales = settings.get("delta", 0.05), settings.get("scales", (Fraction(1, 2),))
    if not 0 < delta < 1:
        raise UsageError(f"delta must lie between 0 and 1, not {delta:g}")
    if choices.spectrum is None:
        raise UsageError(
            "the bundle does not know the spectrum of its model's latents, which progressive needs; "
            "measure it with ddit-run spectrum"
        )
    stages, spectrum = choices.stages(scales), choices.spectrum
    return lambda policy: Progressive(policy, stages, delta, spectrum, own)


def _scales(text: str) -> tuple[Fraction, ...]:
    """``"1/4-1/2"`` as fractions. Raises `ValueError` for what is none, or not rising below 1."""
    if not re.fullmatch(r"\d{1,3}/\d{1,3}(-\d{1,3}/\d{1,3}){0,7}", text):
        raise ValueError(text)
    parts = [part.split("/") for part in text.split("-")]
    if any(not 0 < int(above) < int(below) <= LARGEST_PART for above, below in parts):
        raise ValueError(text)
    scales = tuple(Fraction(int(above), int(below)) for above, below in parts)
    if any(one >= other for one, other in pairwise(scales)):
        raise ValueError(text)
    return scales


LEVELS: Mapping[str, Callable[[str, Choices], Policy]] = {"native": _native, "fixed": _fixed, "dynamic": _dynamic}
REUSE: Mapping[str, Callable[[str, Choices], Reuse]] = {
    "adams": _adams,
    "adaptive": _adaptive,
    "taylorseer": _taylorseer,
    "teacache": _teacache,
    "spectralcache": _spectralcache,
    "dpcache": _dpcache,
}


def _settings(text: str, readers: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """``"tau=0.002,warmup=3"`` as numbers by name; a number alone is the first one's.

    Raises `UsageError` for a name or number that is none.
    """
    settings: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=") if "=" in part else (next(iter(readers)), "", part)
        try:
            settings[name.strip()] = readers[name.strip()](value)
        except (KeyError, ValueError):
            raise UsageError(f"cannot read {part!r} in the schedule; write {FORMS}") from None
    return settings
