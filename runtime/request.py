"""What is asked for (`Request`), and the same with every question answered (`Run`), before anything is loaded."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddit.runtime import shapes
from ddit.runtime.bundle import Manifest
from ddit.runtime.bundle.manifest import MAX_STEPS
from ddit.runtime.conditioning.guidance import guidance_scale, is_guided
from ddit.runtime.errors import UsageError
from ddit.runtime.policies import Policy
from ddit.runtime.policies.parse import NO_GATE
from ddit.runtime.policies.settings import bundle_policy, smooth_curves
from ddit.runtime.samplers.growing import noise_coefficients, small_noise
from ddit.runtime.samplers.sigmas import noise, run_sigmas, run_timesteps
from ddit.runtime.shapes import Size

FloatArray = NDArray[np.float32]

DEFAULT_SCHEDULE = "adaptive"
LONGEST_PROMPT = 100_000  # characters; a tokenizer needs seconds for a single word of this length
LONGEST_BUDGET = 1e6  # seconds
LARGEST_NUMBER = 2**63 - 1


@dataclass(frozen=True)
class Request:
    """One picture or clip, as a user asks for it. What is None is the bundle's choice.

    Args:
        prompt: what it shows.
        seed: of the starting noise; a picture is the same whatever it is batched with, up to rounding.
        steps: denoising steps; as many as a fixed schedule lists.
        schedule: a policy, or one in writing (`ddit.runtime.policies.parse`); `DEFAULT_SCHEDULE` when None.
        height, width: pixels; the profile's optimum when None.
        frames: of a clip; the profile's optimum when None.
        guidance: guidance scale, for models that have one.
        negative_prompt: what it shall not show, for models that are guided by two passes; nothing when None.
        text_length: tokens of the prompt, padding included.
        carry: share of the last native step's detail that coarse steps take over, 0 to 1 (docs/method.md).
        budget: seconds from prompt to picture, instead of a schedule (`ddit.runtime.policies.budget`). The first call
            at a size measures the levels beforehand, unless a calibration on this backend has.
        latent: what the run starts from instead of the seed's noise, (C, H, W) float32 in latent pixels, of a clip
            (C, F, H, W): of the picture's size, or of one of a progressive schedule's scales.
        first_step: number of the step at which ``latent`` is: a run goes on where another one was left. Differences and
            carried detail start anew there.
    """

    prompt: str
    seed: int = 0
    steps: int | None = None
    schedule: str | Policy | None = None
    height: int | None = None
    width: int | None = None
    guidance: float | None = None
    text_length: int | None = None
    carry: float | None = None
    budget: float | None = None
    latent: FloatArray | None = None
    first_step: int = 0
    frames: int | None = None
    negative_prompt: str | None = None

    def resolve(self, manifest: Manifest, backend: str) -> "Run":
        """Answer what was left open. ``backend`` in words, as calibrations name it.

        Raises `UsageError` for what the bundle cannot do.
        """
        check_prompt(self.prompt)
        seed = _integer("the seed", self.seed, least=0, most=None)
        size = manifest.size(
            height=None if self.height is None else _integer("the height", self.height),
            width=None if self.width is None else _integer("the width", self.width),
            frames=None if self.frames is None else _integer("the number of frames", self.frames),
        )
        text = manifest.text_length if self.text_length is None else _integer("the text length", self.text_length)
        sizes = manifest.sizes(size, text=text)
        asked_scale = None if self.guidance is None else _number("guidance", self.guidance)
        guidance = guidance_scale(manifest.guidance, asked_scale)
        guided = is_guided(manifest.guidance, guidance)
        if self.negative_prompt is not None:
            check_text(self.negative_prompt, "the negative prompt")
            if not guided:
                raise UsageError(
                    "a negative prompt needs guidance above 1"
                    if manifest.guidance.two_passes
                    else "this model is not guided by a negative prompt; leave it out"
                )
        carry = manifest.carry if self.carry is None else _number("carry", self.carry)
        if not 0 <= carry <= 1:
            raise UsageError(f"carry must lie between 0 and 1, not {carry:g}")
        budget = None if self.budget is None else _number("the budget", self.budget)
        if budget is not None and not 0 < budget <= LONGEST_BUDGET:
            raise UsageError(f"the budget must be above 0 and at most {LONGEST_BUDGET:g} seconds, not {budget:g}")
        asked = manifest.sampler.steps if self.steps is None else self.steps
        asked = _integer("the number of steps", asked, most=MAX_STEPS)
        first_step = _integer("the first step", self.first_step, least=0)
        if budget is not None and self.schedule is not None:
            raise UsageError("a budget chooses the schedule of one picture; leave the schedule out")
        policy = DEFAULT_SCHEDULE if self.schedule is None else self.schedule
        if isinstance(policy, str):
            sigmas = run_sigmas(manifest, asked, sizes)
            policy = bundle_policy(policy, manifest, sigmas, size=size, backend=backend)
        if not isinstance(policy, Policy):
            raise UsageError(f"the schedule must be a text or a policy, not {policy!r}")
        if policy.gate and manifest.gate is None:
            raise UsageError(f"{policy} needs a gate graph, which the bundle lacks; {NO_GATE}")
        steps = policy.steps(None if self.steps is None else asked, manifest.sampler.steps)
        steps = _integer("the schedule's number of steps", steps, most=MAX_STEPS)
        if first_step >= steps:
            raise UsageError(f"the first step must lie between 0 and {steps - 1}, not {first_step}")
        if first_step and self.latent is None:
            raise UsageError("a run that goes on at a later step needs the latent to go on from")
        scales = {scale: _scaled(manifest, sizes, scale) for scale in policy.scales()}
        start = next(iter(scales))
        latent = self.latent
        if latent is not None:
            try:
                latent = np.asarray(latent, dtype=np.float32)
            except (TypeError, ValueError):
                raise UsageError("the latent must be an array of numbers") from None
            shape = shapes.resolve(manifest.latent.shape, sizes)[1:]
            fitting = [one for one in scales if latent.shape == shapes.resolve(manifest.latent.shape, scales[one])[1:]]
            if not fitting:
                raise UsageError(f"the latent has shape {latent.shape}, a picture of {size} needs {shape}")
            if not np.isfinite(latent).all():
                raise UsageError("the latent holds NaN or infinity")
            (start,) = fitting
        sigmas = run_sigmas(manifest, steps, sizes)
        return Run(
            prompt=self.prompt,
            seed=seed,
            size=size,
            text_length=text,
            sizes=sizes,
            guidance=guidance,
            guided=guided,
            negative_prompt=self.negative_prompt or "",
            carry=carry,
            sigmas=sigmas,
            timesteps=run_timesteps(manifest, steps, sizes),
            policy=policy,
            budget=budget,
            latent=latent,
            first_step=first_step,
            scales=scales,
            start_scale=start,
            rho=manifest.schedule.rho,
            smooth=smooth_curves(manifest, sigmas, size=size, backend=backend),
        )


@dataclass(frozen=True)
class Run:
    """A request with every question answered."""

    prompt: str
    seed: int
    size: Size
    text_length: int  # tokens
    sizes: Mapping[str, int]  # the symbols' values for one sample
    guidance: float
    guided: bool  # whether steps run their level twice, the second time with the negative prompt
    negative_prompt: str
    carry: float
    sigmas: FloatArray  # noise levels, one more than there are steps; the last is 0
    timesteps: FloatArray  # what the model is told of them
    policy: Policy
    budget: float | None  # seconds
    latent: FloatArray | None  # (C, H, W), where it was given
    first_step: int
    scales: Mapping[Fraction, Mapping[str, int]]  # the symbols' values at every scale that the policy may run, rising
    start_scale: Fraction
    rho: float  # the quantile that the trace shows where the policy looks at none
    smooth: Mapping[int, Sequence[float]]  # by coarse patch, smooth pictures' statistic after every step; may be empty

    @property
    def steps(self) -> int:
        """How many steps the noise levels are for; those before ``first_step`` are not run."""
        return len(self.sigmas) - 1

    def start(self, shape: tuple[int, ...], full: tuple[int, ...]) -> FloatArray:
        """The latent that the run starts from: the given one, or the seed's noise of a shape (C, …, H, W).

        Where the latent is to grow, that is what the noise of the ``full`` shape looks like from afar.
        """
        if self.latent is not None:
            return self.latent
        return noise(self.seed, full) if shape == full else small_noise(noise_coefficients(self.seed, full), shape)

    def under(self, policy: Policy) -> "Run":
        """The same run under another policy."""
        return replace(self, policy=policy)


def _scaled(manifest: Manifest, sizes: Mapping[str, int], scale: Fraction) -> dict[str, int]:
    """The symbols' values at a scale. Raises `UsageError` for a size that the bundle's profile does not hold."""
    small = shapes.scaled(manifest.latent, manifest.patches, sizes, scale)
    if not manifest.profile.contains(**shapes.to_names(manifest.latent, small)):
        raise UsageError(
            f"the schedule's scale {scale} is {shapes.to_size(manifest.latent, small)}, outside the bundle's "
            f"profile {manifest.profile.name!r} ({manifest.profile}); choose a larger picture, "
            "or export again with a --profile that has both sizes"
        )
    return small


def check_prompt(prompt: str) -> None:
    """Raise `UsageError` for a prompt that is none."""
    check_text(prompt, "the prompt")
    if not prompt.strip():
        raise UsageError("the prompt is empty")


def check_text(text: str, what: str) -> None:
    """Raise `UsageError` for what no tokenizer shall read."""
    if not isinstance(text, str):
        raise UsageError(f"{what} must be text, not {text!r}")
    if len(text) > LONGEST_PROMPT:
        raise UsageError(f"{what} has {len(text)} characters; at most {LONGEST_PROMPT} are read")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{what} is not valid UTF-8; give it in the terminal's encoding") from None


def _integer(what: str, value: Any, *, least: int = 1, most: int | None = LARGEST_NUMBER) -> int:
    """A whole number within bounds, NumPy's too. Raises `UsageError`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise UsageError(f"{what} must be a whole number, not {value!r}") from None
    if number < least or isinstance(value, bool):
        raise UsageError(f"{what} must be at least {least}, not {value}")
    if most is not None and number > most:
        raise UsageError(f"{what} must be at most {most}, not {number}")
    return number


def _number(what: str, value: Any) -> float:
    """A finite number. Raises `UsageError`."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{what} must be a number, not {value!r}") from None
    if not math.isfinite(number):
        raise UsageError(f"{what} must be a number, not {number}")
    return number
