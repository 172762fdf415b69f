"""The loop: prompt → context → latent → picture, with the level chosen anew at every denoising step."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image

from ddit.runtime import shapes
from ddit.runtime.backends.base import Backend, FloatArray, Start
from ddit.runtime.backends.registry import open_backend
from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.manifest import Costs, ScheduleInfo
from ddit.runtime.complexity import Complexity
from ddit.runtime.conditioning.positions import level_tables
from ddit.runtime.conditioning.text import Tokenizer
from ddit.runtime.errors import UsageError
from ddit.runtime.policies.budget import Budgeted, plan
from ddit.runtime.policies.schedule import (
    DIFFERENCE_ORDER,
    Dynamic,
    Fixed,
    Schedule,
    describe,
    parse_schedule,
    statistic,
)
from ddit.runtime.policies.smooth import smooth_at
from ddit.runtime.samplers.sigmas import noise, sigmas
from ddit.runtime.trace import StepRecord, Trace

log = logging.getLogger(__name__)

OnStep = Callable[[int, int, list[int]], None]


@dataclass(frozen=True)
class Result:
    """A picture and how it came about."""

    image: Image.Image
    trace: Trace
    latent: FloatArray  # (C, H, W), what was decoded


class Pipeline:
    """A bundle, ready to make pictures.

        >>> from ddit.runtime import Pipeline
        >>> Pipeline.open("demo.bundle")("a red circle on a striped background", seed=7).image.save("out.png")

    One pipeline may be called from several threads at once. Opening a graph is serialised; runs are not, they share the
    sessions and compete for the machine's cores.
    """

    def __init__(self, bundle: Bundle, backend: Backend):
        self.bundle = bundle
        self.backend = backend
        self._tokenizers = [
            Tokenizer(bundle.file(one.tokenizer.file), one.tokenizer) for one in bundle.manifest.encoders
        ]
        self._rotary = lru_cache(maxsize=16)(self._make_rotary)
        self._costs = lru_cache(maxsize=16)(self._find_costs)

    @classmethod
    def open(cls, path: Path | str, *, backend: str | None = None, threads: int | None = None) -> "Pipeline":
        """Open a bundle's folder. Graphs are loaded when they are first needed.

        Args:
            backend: a name, see `ddit.runtime.backends.registry`; the fastest here when None.
            threads: of one graph on the CPU; all cores when None.

        Raises:
            BundleError, BackendError, UsageError: the bundle is damaged, or the backend cannot run here.
        """
        bundle = Bundle.open(path)
        return cls(bundle, open_backend(backend, bundle, threads))

    def __call__(
        self,
        prompt: str,
        *,
        seed: int = 0,
        steps: int | None = None,
        schedule: str | Schedule = "dynamic",
        height: int | None = None,
        width: int | None = None,
        guidance: float | None = None,
        text_length: int | None = None,
        carry: float | None = None,
        budget: float | None = None,
        on_step: OnStep | None = None,
    ) -> Result:
        """Make one picture; the arguments are those of `batch`."""
        return self.batch(
            [prompt],
            seeds=[seed],
            steps=steps,
            schedule=schedule,
            height=height,
            width=width,
            guidance=guidance,
            text_length=text_length,
            carry=carry,
            budget=budget,
            on_step=on_step,
        )[0]

    def batch(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        schedule: str | Schedule = "dynamic",
        height: int | None = None,
        width: int | None = None,
        guidance: float | None = None,
        text_length: int | None = None,
        carry: float | None = None,
        budget: float | None = None,
        on_step: OnStep | None = None,
    ) -> list[Result]:
        """Make several pictures together. Each follows its own schedule: samples at the same level run in one call.

        Args:
            prompts: one a picture.
            seeds: one a picture; a picture is the same whatever it is batched with, up to rounding.
            steps: denoising steps; the bundle's default when None, or as many as a fixed schedule lists.
            schedule: a schedule or its written form, see `ddit.runtime.policies.schedule`.
            height, width: pixels; the profile's optimum when None.
            guidance: guidance scale, for models that were distilled for it; the bundle's default when None.
            text_length: tokens of the prompt, padding included; the bundle's default when None.
            carry: share of the last native step's detail that coarse steps take over, 0 to 1 (docs/method.md); the
                bundle's default when None.
            budget: seconds from one prompt to its picture, instead of a schedule; see `ddit.runtime.policies.budget`.
                The first call at a size measures the levels beforehand, unless a calibration on this backend has.
            on_step: called after every step with its number, the number of steps, and the samples' levels.

        Raises:
            UsageError: for a request that the bundle cannot meet.
            BackendError: when the engine fails.
        """
        manifest = self.bundle.manifest
        if len(prompts) != len(seeds):
            raise UsageError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        if not prompts or any(not prompt.strip() for prompt in prompts):
            raise UsageError("the prompt is empty")
        optimum = manifest.profile.entry[0]
        height, width = height or optimum.height.optimum, width or optimum.width.optimum
        text_length = text_length or manifest.text_length
        sizes = manifest.sizes(height=height, width=width, text=text_length, batch=len(prompts))
        self.backend.check(height=height, width=width, text=text_length, batch=len(prompts))
        guidance = self._guidance(guidance)
        carry = manifest.carry if carry is None else carry
        if not 0 <= carry <= 1:
            raise UsageError(f"carry must lie between 0 and 1, not {carry:g}")
        if isinstance(schedule, str):
            schedule = self.schedule(schedule, steps=steps, height=height, width=width)
        steps = self._steps(steps, schedule)
        costs = None
        if budget is not None:
            if len(prompts) > 1 or not isinstance(schedule, Dynamic):
                raise UsageError("a budget chooses the schedule of one picture; leave the schedule out")
            costs = self._costs(height, width)
            known = manifest.calibration(steps=steps, height=height, width=width, backend=str(self.backend))
            schedule = plan(budget, costs, steps, default=schedule, curve=known.curve if known else ())

        traces = [
            Trace(prompt, seed, height, width, guidance, carry, self.backend.name, describe(schedule))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        start = perf_counter()
        if budget is not None and costs is not None:
            schedule = Budgeted(schedule, costs.levels, steps, deadline=start + budget - costs.decode / 1000)
        conditions = self._encode(prompts, text_length)
        encoded = perf_counter()
        latent = np.concatenate([noise(seed, (1, manifest.latent.channels, sizes["H"], sizes["W"])) for seed in seeds])
        if manifest.guidance.embedded:
            conditions["guidance"] = np.full(len(prompts), guidance, dtype=np.float32)
        latent = self._denoise(latent, conditions, carry, steps, schedule, traces, on_step)
        denoised = perf_counter()
        pictures = self.backend.engine(manifest.decoder.graph).run({"latent": latent})["image"]
        for trace in traces:
            trace.encode_milliseconds = (encoded - start) * 1000
            trace.decode_milliseconds = (perf_counter() - denoised) * 1000
        return [
            Result(to_image(picture), trace, one) for picture, trace, one in zip(pictures, traces, latent, strict=True)
        ]

    def schedule(
        self, text: str, *, steps: int | None = None, height: int | None = None, width: int | None = None
    ) -> Schedule:
        """A schedule from its written form, with the bundle's calibration for the steps and size, or its defaults."""
        manifest = self.bundle.manifest
        optimum = manifest.profile.entry[0]
        steps = steps or manifest.sampler.steps
        height, width = height or optimum.height.optimum, width or optimum.width.optimum
        info = self._settings(steps, height, width)
        coarsest = info.coarsest or max(manifest.patches)
        coarse = tuple(patch for patch in manifest.patches if manifest.native < patch <= coarsest)
        reference = self._reference(steps, height, width)
        default = Dynamic(manifest.native, coarse, info.tau, info.rho, info.warmup, info.hold, reference)
        return parse_schedule(text, patches=manifest.patches, native=manifest.native, default=default)

    def sigmas(self, steps: int, height: int, width: int) -> FloatArray:
        """The noise levels of a run at a size in pixels, one more than there are steps; the last is 0."""
        manifest = self.bundle.manifest
        sides = shapes.to_symbols(manifest.latent, {"height": height, "width": width}).values()
        return sigmas(manifest.sampler, steps, prod(side // manifest.native for side in sides))

    def _settings(self, steps: int, height: int, width: int) -> ScheduleInfo:
        """The dynamic schedule's settings on this backend."""
        return self.bundle.manifest.dynamic(steps=steps, height=height, width=width, backend=str(self.backend))

    def _reference(self, steps: int, height: int, width: int) -> Mapping[int, Sequence[float]] | None:
        """The statistics of smooth pictures after every step, by coarse patch; None where the bundle has none."""
        points = self._settings(steps, height, width).smooth
        return smooth_at(points, self.sigmas(steps, height, width)) if points else None

    def _smooth(self, patch: int | None, steps: int, height: int, width: int) -> Sequence[float]:
        """What a coarse level's statistic is in smooth pictures after every step; 1 where the bundle does not know."""
        known = self._reference(steps, height, width) or {}
        return known.get(patch, [1.0] * steps) if patch else []

    def measure_costs(self, height: int, width: int, repeat: int = 7) -> Costs:
        """Time a few steps of all levels in turn, after one of each that warms up."""
        patches = self.bundle.manifest.patches
        self("warm up", schedule=Fixed(patches), height=height, width=width)
        trace = self("measure", schedule=Fixed(patches * repeat), height=height, width=width).trace
        times = trace.milliseconds_per_level()
        return Costs(levels=times, encode=trace.encode_milliseconds, decode=trace.decode_milliseconds)

    def _find_costs(self, height: int, width: int) -> Costs:
        """The costs at a size, with engines that are loaded afterwards: no budget could hold that."""
        for known in self.bundle.manifest.calibrations:
            if (known.height, known.width, known.backend) == (height, width, str(self.backend)):
                self("warm up", schedule=Fixed(self.bundle.manifest.patches), height=height, width=width)
                return known.costs
        log.info("measuring the levels at %d×%d", height, width)
        return self.measure_costs(height, width)

    def _guidance(self, asked: float | None) -> float:
        info = self.bundle.manifest.guidance
        if asked is not None and not info.embedded and asked != info.default:
            raise UsageError("this model takes no guidance scale (it was not distilled for one); leave it out")
        return info.default if asked is None else asked

    def _steps(self, asked: int | None, schedule: Schedule) -> int:
        if isinstance(schedule, Fixed):
            if asked is not None and asked != len(schedule.levels):
                raise UsageError(f"the fixed schedule has {len(schedule.levels)} steps, not {asked}")
            return len(schedule.levels)
        steps = self.bundle.manifest.sampler.steps if asked is None else asked
        if steps < 1:
            raise UsageError(f"the number of steps must be at least 1, not {steps}")
        return steps

    def _encode(self, prompts: Sequence[str], text_length: int) -> dict[str, FloatArray]:
        """What the text encoders feed into the levels, a row a prompt."""
        conditions: dict[str, FloatArray] = {}
        for encoder, tokenizer in zip(self.bundle.manifest.encoders, self._tokenizers, strict=True):
            ids = []
            for prompt in prompts:
                length = text_length if encoder.free_length else encoder.tokenizer.length
                tokens, lost = tokenizer(prompt, length)
                if lost and encoder.free_length:
                    log.warning("the prompt is longer than %d tokens; left out: “%s”", length, lost)
                ids.append(tokens)
            outputs = self.backend.engine(encoder.graph).run({"input_ids": np.stack(ids)})
            conditions |= {encoder.feeds[name]: value for name, value in outputs.items()}
        return conditions

    def _make_rotary(self, patch: int, height: int, width: int) -> tuple[FloatArray, FloatArray]:
        manifest = self.bundle.manifest
        sizes = {"H": height, "W": width}
        tables = level_tables(manifest.positions, manifest.latent, manifest.native, patch, sizes)
        return tables["rope_cos"], tables["rope_sin"]

    def _denoise(
        self,
        latent: FloatArray,
        conditions: dict[str, FloatArray],
        carry: float,
        steps: int,
        schedule: Schedule,
        traces: list[Trace],
        on_step: OnStep | None,
    ) -> FloatArray:
        """Run the steps. The state is float32: in half precision third differences drown in rounding (METHOD, τ)."""
        manifest = self.bundle.manifest
        batch, _, height, width = latent.shape
        pixels = shapes.to_names(manifest.latent, {"H": height, "W": width})
        sigma = self.sigmas(steps, **pixels)
        wanted = schedule.wanted if isinstance(schedule, Budgeted) else schedule
        rho = wanted.rho if isinstance(wanted, Dynamic) else manifest.schedule.rho
        known: list[dict[int, FloatArray]] = [{} for _ in range(batch)]
        finest = min((patch for patch in manifest.patches if patch != manifest.native), default=None)
        smooth = self._smooth(finest, steps, **pixels)
        for trace in traces:
            trace.complexity = None if finest is None else Complexity(finest)

        start = Start(latent, conditions, sigma, lambda patch: self._rotary(patch, height, width), carry)
        with self.backend.denoiser(start) as denoiser:
            for step in range(steps):
                groups: defaultdict[int, list[int]] = defaultdict(list)
                for sample in range(batch):
                    groups[schedule.level(traces[sample].levels, known[sample])].append(sample)
                for patch, members in groups.items():
                    begin = perf_counter()
                    deviations = denoiser.step(step, patch, members)
                    milliseconds = (perf_counter() - begin) * 1000
                    for row, sample in enumerate(members):
                        if step + 1 >= DIFFERENCE_ORDER:
                            known[sample] = {coarse: values[row] for coarse, values in deviations.items()}
                            latest = {*traces[sample].levels[1 - DIFFERENCE_ORDER :], patch}
                            # across a switch the difference shows how levels disagree, not what the picture does
                            if (complexity := traces[sample].complexity) and len(latest) == 1:
                                complexity.add(step, known[sample][complexity.patch] / smooth[step])
                        measured = {coarse: statistic(values, rho) for coarse, values in known[sample].items()}
                        record = StepRecord(step, float(sigma[step]), patch, milliseconds, measured)
                        traces[sample].steps.append(record)
                if on_step is not None:
                    on_step(step, steps, [trace.levels[-1] for trace in traces])
            return denoiser.latent()


def to_image(picture: FloatArray) -> Image.Image:
    """A picture from ``(3, height, width)`` in [-1, 1]."""
    pixels = np.round((np.clip(picture, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    return Image.fromarray(pixels.transpose(1, 2, 0))
