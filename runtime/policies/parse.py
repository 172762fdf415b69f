"""Policies in writing, as ``--schedule`` takes them.

native                          every step at the native level
fixed:8x10,4x20,2x20            ten steps at level 8, then twenty at 4, then twenty at 2
dynamic                         by content (DDiT), with the bundle's settings
dynamic:tau=0.002,rho=0.4       the same with settings of one's own: tau, rho, warmup, hold, coarsest
dynamic:absolute=1,tau=0.001    τ as the paper has it, not a multiple of smooth pictures' statistic
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from ddit.runtime.bundle.manifest import MAX_STEPS
from ddit.runtime.errors import UsageError
from ddit.runtime.policies.base import DIFFERENCE_ORDER, Policy
from ddit.runtime.policies.dynamic import Dynamic
from ddit.runtime.policies.fixed import Fixed
from ddit.runtime.policies.native import Native

FORMS = "native, fixed:8x10,4x20,2x20 or dynamic[:tau=0.001,rho=0.4,warmup=3,hold=3,coarsest=8,absolute=0]"


def parse_schedule(text: str, *, patches: Sequence[int], native: int, default: Dynamic) -> Policy:
    """Make a schedule from its written form; ``default`` gives what ``dynamic`` leaves unsaid. Raises `UsageError`."""
    kind, _, rest = text.strip().partition(":")
    if kind == "native" and not rest:
        return Native(native)
    if kind == "fixed" and rest:
        return Fixed(_fixed_levels(rest, patches))
    if kind == "dynamic":
        return _with_settings(default, rest, patches)
    raise UsageError(f"unknown schedule {text!r}; write {FORMS}")


def _fixed_levels(text: str, patches: Sequence[int]) -> tuple[int, ...]:
    levels: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", part)
        if match is None:
            raise UsageError(f"cannot read {part!r} in the schedule; write LEVELxSTEPS, as in fixed:4x20,2x30")
        patch, count = int(match[1]), int(match[2] or 1)
        if patch not in patches:
            raise UsageError(f"the schedule asks for level {patch}; the bundle has {', '.join(map(str, patches))}")
        if count > MAX_STEPS - len(levels):
            raise UsageError(f"the schedule has more than {MAX_STEPS} steps")
        levels += [patch] * count
    return tuple(levels)


def _with_settings(default: Dynamic, text: str, patches: Sequence[int]) -> Dynamic:
    readers = {"tau": float, "rho": float, "warmup": int, "hold": int, "coarsest": int, "absolute": int}
    settings: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            settings[name.strip()] = readers[name.strip()](value)
        except (KeyError, ValueError):
            raise UsageError(f"cannot read {part!r} in the schedule; write {FORMS}") from None
    coarsest = settings.pop("coarsest", None)
    if coarsest is not None:
        if coarsest < default.native:
            raise UsageError(f"coarsest must be at least the native level {default.native}, not {coarsest}")
        default = replace(default, coarse=tuple(patch for patch in patches if default.native < patch <= coarsest))
    if settings.pop("absolute", 0) and default.smooth:
        if "tau" not in settings:
            raise UsageError(
                "an absolute tau must be given, as in dynamic:absolute=1,tau=0.001: the bundle's is relative"
            )
        default = replace(default, smooth=None)
    schedule = replace(default, **settings)  # type: ignore[arg-type]
    if not 0 < schedule.tau < math.inf:
        raise UsageError(f"tau must be above 0, and finite, not {schedule.tau:g}")
    if not 0 < schedule.rho < 1:
        raise UsageError(f"rho must lie between 0 and 1, not {schedule.rho:g}")
    if schedule.warmup < DIFFERENCE_ORDER:
        raise UsageError(f"warmup must be at least {DIFFERENCE_ORDER}: the third difference needs that many steps")
    if schedule.hold < 1:
        raise UsageError(f"hold must be at least 1 step, not {schedule.hold}")
    return schedule
