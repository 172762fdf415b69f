"""Patch schedules: which level the next denoising step runs at.

A schedule is a small value that knows nothing of the model: it is asked for the level of a step and sees what the
step graph measured after the step before. `parse_schedule` makes one from the words that the commands take:

    native                          every step at the native level
    fixed:8x10,4x20,2x20            ten steps at level 8, then twenty at 4, then twenty at 2
    dynamic                         by content (DDiT), with the bundle's defaults
    dynamic:tau=0.002,rho=0.4       the same with settings of one's own: tau, rho, warmup, hold, coarsest
    dynamic:absolute=1,tau=0.001    τ as the paper has it, not relative to smooth pictures
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ddit.runtime.errors import UsageError

FloatArray = NDArray[np.float32]

DIFFERENCE_ORDER = 3  # third differences need three finished steps
FORMS = "native, fixed:8x10,4x20,2x20 or dynamic[:tau=0.001,rho=0.4,warmup=3,hold=3,coarsest=8,absolute=0]"


class Schedule(Protocol):
    """Chooses levels. Implementations are immutable, so that one object serves every sample and thread."""

    def level(self, past: Sequence[int], deviations: Mapping[int, FloatArray]) -> int:
        """The patch of the next step.

        ``past`` holds the patches of the steps that are done; ``deviations``, for every coarse patch, the deviation of
        the third difference inside each patch of this sample's latent (see `ddit.exporter.steps.update`), measured
        after the last of them; shape (H/p, W/p).
        """
        ...


@dataclass(frozen=True)
class Native:
    """Every step at the native level: the base model, unchanged."""

    native: int

    def level(self, past: Sequence[int], deviations: Mapping[int, FloatArray]) -> int:
        """Always the native patch."""
        return self.native


@dataclass(frozen=True)
class Fixed:
    """A list of levels, one a step, whatever the picture (FlexiDiT, arXiv 2502.20126)."""

    levels: tuple[int, ...]

    def level(self, past: Sequence[int], deviations: Mapping[int, FloatArray]) -> int:
        """The step's entry in the list."""
        return self.levels[len(past)]


@dataclass(frozen=True)
class Dynamic:
    """DDiT's schedule (arXiv 2602.16968): as coarse as the latent's third difference is smooth.

    The next step runs at the largest patch p whose statistic σ_p, the ``rho`` quantile over the patches of the
    deviation inside them, lies under ``tau``; else at the native patch. The first ``warmup`` steps are native.
    ``tau`` belongs to a model, a step count and a sigma shift: it is calibrated, never assumed. With ``smooth``,
    the statistic of smooth pictures by patch and step (`ddit.runtime.policies.smooth`), it is a multiple of that: how
    much more detail than in a smooth picture a coarse step may meet.

    A level keeps running for ``hold`` steps. Levels disagree a little about the velocity, so a switch is itself a jump
    that three differences carry on: decided from those, coarse steps would forbid each other (docs/method.md). After
    three steps at one level the difference compares like with like. The paper says nothing of this; ``hold`` = 1 is the
    rule as it stands there.
    """

    native: int
    coarse: tuple[int, ...]
    tau: float
    rho: float
    warmup: int
    hold: int = DIFFERENCE_ORDER
    smooth: Mapping[int, Sequence[float]] | None = None

    def level(self, past: Sequence[int], deviations: Mapping[int, FloatArray]) -> int:
        """The largest patch under the threshold."""
        if not self.decides(past):
            return past[-1] if len(past) >= self.warmup else self.native
        after = len(past) - 1
        under = [p for p in self.coarse if statistic(deviations[p], self.rho) < self.threshold(p, after)]
        return max(under, default=self.native)

    def decides(self, past: Sequence[int]) -> bool:
        """Whether the next level depends on the deviations: the warm-up is over, and a level has run long enough."""
        return len(past) >= self.warmup and all(patch == past[-1] for patch in past[-self.hold :])

    def threshold(self, patch: int, step: int) -> float:
        """What the statistic after a step must lie under."""
        return self.tau * (self.smooth[patch][step] if self.smooth else 1.0)


def statistic(deviation: FloatArray, rho: float) -> float:
    """σ_p: the ``rho`` quantile of the patches' deviations.

    A quantile and not the mean, so that a flat background does not hide a zebra.
    """
    return float(np.quantile(deviation, rho))


def parse_schedule(text: str, *, patches: Sequence[int], native: int, default: Dynamic) -> Schedule:
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
        patch, cross, count = part.partition("x")
        if not (patch.isdecimal() and (count.isdecimal() if cross else not count)):
            raise UsageError(f"cannot read {part!r} in the schedule; write LEVELxSTEPS, as in fixed:4x20,2x30")
        if int(patch) not in patches:
            raise UsageError(f"the schedule asks for level {patch}; the bundle has {', '.join(map(str, patches))}")
        levels += [int(patch)] * int(count or 1)
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
    if coarsest := settings.pop("coarsest", None):
        default = replace(default, coarse=tuple(patch for patch in patches if default.native < patch <= coarsest))
    if settings.pop("absolute", 0) and default.smooth:
        if "tau" not in settings:
            raise UsageError(
                "an absolute tau must be given, as in dynamic:absolute=1,tau=0.001: the bundle's is relative"
            )
        default = replace(default, smooth=None)
    schedule = replace(default, **settings)  # type: ignore[arg-type]
    if not schedule.tau > 0:
        raise UsageError(f"tau must be above 0, not {schedule.tau:g}")
    if not 0 < schedule.rho < 1:
        raise UsageError(f"rho must lie between 0 and 1, not {schedule.rho:g}")
    if schedule.warmup < DIFFERENCE_ORDER:
        raise UsageError(f"warmup must be at least {DIFFERENCE_ORDER}: the third difference needs that many steps")
    if schedule.hold < 1:
        raise UsageError(f"hold must be at least 1 step, not {schedule.hold}")
    return schedule


def write_schedule(schedule: Schedule) -> str:
    """A schedule in the form that `parse_schedule` reads."""
    if isinstance(schedule, Fixed):
        runs = ((patch, sum(1 for _ in same)) for patch, same in groupby(schedule.levels))
        return "fixed:" + ",".join(f"{patch}x{count}" for patch, count in runs)
    if isinstance(schedule, Dynamic):
        coarsest = max(schedule.coarse, default=schedule.native)
        rule = f"rho={schedule.rho:g},warmup={schedule.warmup},hold={schedule.hold},coarsest={coarsest}"
        return f"dynamic:tau={schedule.tau:.4g},{rule}{'' if schedule.smooth else ',absolute=1'}"
    return type(schedule).__name__.lower()


def describe(schedule: Schedule) -> dict[str, object]:
    """The schedule as plain data, for the trace."""
    values = {field.name: getattr(schedule, field.name) for field in fields(schedule)}  # type: ignore[arg-type]
    return {"kind": type(schedule).__name__.lower(), "text": write_schedule(schedule), **values}
