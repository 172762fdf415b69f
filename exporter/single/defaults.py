"""What a single model does where its caller says nothing: a schedule, and the bundle's settings for a run."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ddit.runtime.bundle import Manifest
from ddit.runtime.bundle.manifest import SmoothPoint
from ddit.runtime.errors import UsageError
from ddit.runtime.policies import Policy
from ddit.runtime.policies.adaptive import Adaptive
from ddit.runtime.policies.dynamic import Dynamic
from ddit.runtime.policies.fixed import Fixed
from ddit.runtime.policies.native import Native
from ddit.runtime.policies.reuse import Reusing
from ddit.runtime.request import Request

BY_CONTENT = 0  # an entry of `Defaults.levels`: the dynamic policy decides


@dataclass(frozen=True)
class Defaults:
    """The values of the inputs that may be left out, by name, and the curve that τ is relative to."""

    steps: int
    levels: tuple[int, ...]
    guidance: float
    carry: float
    tolerance: float
    order: int
    tau: float
    rho: float
    warmup: int
    hold: int
    coarsest: int
    smooth: Sequence[SmoothPoint]  # empty: τ is absolute


def find_defaults(
    manifest: Manifest,
    schedule: str | None = None,
    *,
    steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    backend: str,
) -> Defaults:
    """Those of a schedule in writing, with the bundle's settings for the run on a backend.

    Raises `UsageError` for a schedule that a single model does not have.
    """
    request = Request("a prompt", steps=steps, schedule=schedule, height=height, width=width)
    run = request.resolve(manifest, backend)
    settings = manifest.dynamic(steps=run.steps, size=run.size, backend=backend)
    found = Defaults(
        steps=run.steps,
        levels=(manifest.native,),
        guidance=run.guidance,
        carry=run.carry,
        tolerance=0.0,
        order=manifest.prediction(steps=run.steps, size=run.size, backend=backend).order,
        tau=settings.tau,
        rho=settings.rho,
        warmup=settings.warmup,
        hold=settings.hold,
        coarsest=settings.coarsest or max(manifest.patches),
        smooth=settings.smooth,
    )
    policy: Policy = run.policy
    if isinstance(policy, Reusing) and isinstance(policy.reuse, Adaptive):
        found = replace(found, tolerance=policy.reuse.tolerance, order=policy.reuse.order)
        policy = policy.levels
    if isinstance(policy, Dynamic):
        return replace(
            found,
            levels=(BY_CONTENT,),
            tau=policy.tau,
            rho=policy.rho,
            warmup=policy.warmup,
            hold=policy.hold,
            coarsest=max(policy.coarse, default=manifest.native),
            smooth=settings.smooth if policy.smooth else (),
        )
    if isinstance(policy, Fixed):
        return replace(found, levels=policy.levels)
    if not isinstance(policy, Native):
        raise UsageError(
            f"a single model has the schedules native, fixed and dynamic, each with adaptive or without, not {policy}"
        )
    return found
