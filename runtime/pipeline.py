"""Prompts to pictures and clips: encode, denoise, decode."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from threading import RLock
from time import perf_counter

import numpy as np
from PIL import Image

from ddit.runtime import shapes
from ddit.runtime.backends.base import Backend, FloatArray
from ddit.runtime.backends.registry import open_backend
from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.manifest import Costs
from ddit.runtime.bundle.names import NEGATIVE
from ddit.runtime.conditioning.guidance import guidance_inputs
from ddit.runtime.conditioning.text import TextConditioner
from ddit.runtime.costs import find_costs
from ddit.runtime.decoding import Frames, OnFrame, make_decoder
from ddit.runtime.denoise import OnStep, denoise
from ddit.runtime.errors import UsageError
from ddit.runtime.policies import Adaptive, Budgeted, Policy
from ddit.runtime.policies.budget import plan
from ddit.runtime.policies.settings import bundle_policy
from ddit.runtime.request import Request, Run
from ddit.runtime.samplers.sigmas import run_sigmas
from ddit.runtime.session import Sample, Session
from ddit.runtime.step import Programs
from ddit.runtime.trace import Trace


@dataclass(frozen=True)
class Result:
    """A picture or a clip, and how it came about."""

    frames: Frames  # of a picture one
    trace: Trace
    latent: FloatArray  # (C, H, W), of a clip (C, F, H, W): what was decoded

    @property
    def image(self) -> Image.Image:
        """The picture; of a clip the first frame."""
        return self.frames[0]


class Pipeline:
    """A bundle, ready to make pictures.

        >>> from ddit.runtime import Pipeline
        >>> Pipeline.open("demo.bundle")("a red circle on a striped background", seed=7).image.save("out.png")

    `encode`, `denoise` and `decode` are its three parts, for whoever wants to look or reach in between.

    One pipeline may be called from several threads at once. Opening a graph is serialised; runs are not, they share the
    sessions and compete for the machine's cores.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, vae_tiling: int | None = None):
        """``vae_tiling`` as `open` takes it. Raises `UsageError` for tiles that the bundle's latent is not cut into."""
        self.bundle = bundle
        self.backend = backend
        self._text = TextConditioner(backend)
        self._decoder = make_decoder(backend, vae_tiling)
        self._programs = Programs(bundle.manifest)
        self._known_costs = lru_cache(maxsize=16)(partial(find_costs, self))
        self._alone = RLock()  # held by a run that lets go of engines

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        backend: str | None = None,
        threads: int | None = None,
        low_memory: bool = False,
        vae_tiling: int | None = None,
    ) -> "Pipeline":
        """Open a bundle's folder. Graphs are loaded when they are first needed.

        Args:
            backend: a name, see `ddit.runtime.backends.registry`; the fastest here when None.
            threads: of one graph on the CPU; all cores when None.
            low_memory: text encoders leave memory before the levels come, and are loaded anew for the next run. Runs
                of several threads wait for each other then. Needs no asking for where `cuda` finds too little memory.
            vae_tiling: the side in pixels of overlapping tiles in which pictures and clips that are larger are decoded,
                so that the decoder takes no more memory than for a tile; a multiple of 32 with FLUX.1 and Wan 2.1. The
                result is that of diffusers' ``vae.enable_tiling()``, and not that of decoding whole: the decoder's
                norms see a tile only.

        Raises:
            BundleError, BackendError, UsageError: the bundle is damaged, the backend cannot run here, or the latent is
                not cut into such tiles.
        """
        bundle = Bundle.open(path)
        return cls(bundle, open_backend(backend, bundle, threads, low_memory=low_memory), vae_tiling=vae_tiling)

    def __call__(
        self,
        prompt: str,
        *,
        seed: int = 0,
        steps: int | None = None,
        schedule: str | Policy | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance: float | None = None,
        text_length: int | None = None,
        carry: float | None = None,
        budget: float | None = None,
        latent: FloatArray | None = None,
        first_step: int = 0,
        frames: int | None = None,
        negative_prompt: str | None = None,
        on_step: OnStep | None = None,
        on_frame: OnFrame | None = None,
    ) -> Result:
        """Make one picture or clip. The arguments are those of `Request`.

        ``on_step`` is told of every step (`Progress`), ``on_frame`` of every latent frame that was decoded, with
        ``vae_tiling`` of every one of a tile.

        Raises:
            UsageError: for a request that the bundle cannot meet.
            BackendError: when an engine fails.
        """
        request = Request(
            prompt=prompt,
            seed=seed,
            steps=steps,
            schedule=schedule,
            height=height,
            width=width,
            guidance=guidance,
            text_length=text_length,
            carry=carry,
            budget=budget,
            latent=latent,
            first_step=first_step,
            frames=frames,
            negative_prompt=negative_prompt,
        )
        return self.run([request], on_step, on_frame)[0]

    def batch(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        schedule: str | Policy | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance: float | None = None,
        text_length: int | None = None,
        carry: float | None = None,
        frames: int | None = None,
        negative_prompt: str | None = None,
        on_step: OnStep | None = None,
    ) -> list[Result]:
        """Make several pictures or clips of one size together, a prompt and a seed each. See `run`."""
        if isinstance(prompts, str) or isinstance(seeds, int):
            raise UsageError("prompts and seeds are lists with an entry a picture; call the pipeline itself for one")
        if len(prompts) != len(seeds):
            raise UsageError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        requests = [
            Request(
                prompt,
                seed,
                steps,
                schedule,
                height,
                width,
                guidance,
                text_length,
                carry,
                frames=frames,
                negative_prompt=negative_prompt,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return self.run(requests, on_step)

    def run(
        self, requests: Sequence[Request], on_step: OnStep | None = None, on_frame: OnFrame | None = None
    ) -> list[Result]:
        """Make a picture or clip for every request.

        Each follows its own policy; samples at the same level run in one call.

        Raises:
            UsageError: for requests that the bundle cannot meet together.
            BackendError: when an engine fails.
        """
        with self._alone if self.backend.low_memory else nullcontext():
            return self._run(self.resolve(requests), on_step, on_frame)

    def _run(self, runs: Sequence[Run], on_step: OnStep | None, on_frame: OnFrame | None) -> list[Result]:
        for run in runs:
            if run.budget is not None:
                self.costs(run.size)  # measured before the clock starts, where they are not known
        start = perf_counter()
        runs = [self.within_budget(run, start) for run in runs]
        if self.backend.low_memory:
            self.backend.release()  # of the last run's levels
        conditions = self.conditions(runs)
        if self.backend.low_memory:
            self.backend.release()
        encoded = perf_counter()
        latents, traces = self.denoise(runs, conditions, on_step)
        denoised = perf_counter()
        clips = self.decode(latents, on_frame)
        for trace in traces:
            trace.encode_milliseconds = (encoded - start) * 1000
            trace.decode_milliseconds = (perf_counter() - denoised) * 1000
        return [Result(*one) for one in zip(clips, traces, latents, strict=True)]

    def resolve(self, requests: Sequence[Request]) -> list[Run]:
        """Requests with every question answered; nothing is loaded. Raises `UsageError` for what cannot be done."""
        if not requests:
            raise UsageError("there is no prompt")
        runs = [request.resolve(self.bundle.manifest, str(self.backend)) for request in requests]
        first = runs[0]
        if any(run.sizes != first.sizes for run in runs):
            raise UsageError("what is made together must have one size and one text length")
        if len(runs) > 1 and any(run.budget is not None for run in runs):
            raise UsageError("a budget chooses the schedule of one picture; make it alone")
        self.bundle.manifest.sizes(first.size, text=first.text_length, batch=len(runs))
        for sizes in {tuple(scaled.items()): scaled for run in runs for scaled in run.scales.values()}.values():
            self.backend.check({**shapes.to_names(self.bundle.manifest.latent, sizes), "batch": len(runs)})
            self._decoder.tiling(sizes["H"], sizes["W"], len(runs))
        return runs

    def encode(self, prompts: Sequence[str], text_length: int | None = None) -> dict[str, FloatArray]:
        """What the text encoders make of prompts: the levels' inputs by name, a row a prompt.

        ``text_length`` counts tokens, padding included; the bundle's default when None.
        """
        return self._text(prompts, self.bundle.manifest.text_length if text_length is None else text_length)

    def encode_negative(self, prompts: Sequence[str], text_length: int | None = None) -> dict[str, FloatArray]:
        """The same for negative prompts, whose inputs have names of their own."""
        return {NEGATIVE + name: values for name, values in self.encode(prompts, text_length).items()}

    def conditions(self, runs: Sequence[Run]) -> dict[str, FloatArray]:
        """The levels' inputs that text feeds, a row a run: of the prompts, and of negative ones where a run has one.

        The runs have one text length.
        """
        length = runs[0].text_length
        conditions = self.encode([run.prompt for run in runs], length)
        if any(run.guided for run in runs):
            conditions |= self.encode_negative([run.negative_prompt for run in runs], length)
        return conditions

    def session(self) -> Session:
        """A session on this pipeline's backend, with nothing in flight."""
        return Session(self.backend, self._programs)

    def admit(self, session: Session, runs: Sequence[Run], conditions: Mapping[str, FloatArray]) -> list[Sample]:
        """Start runs in a session. ``conditions`` has a row a run."""
        guidance = self.bundle.manifest.guidance
        samples = []
        for row, run in enumerate(runs):
            own = {
                name: values[row] for name, values in conditions.items() if run.guided or not name.startswith(NEGATIVE)
            }
            samples.append(session.admit(run, {**own, **guidance_inputs(guidance, run.guidance)}))
        return samples

    def denoise(
        self, runs: Sequence[Run], conditions: Mapping[str, FloatArray], on_step: OnStep | None = None
    ) -> tuple[FloatArray, list[Trace]]:
        """Run all steps; returns the latents (B, C, H, W) and what every run did.

        ``runs`` comes from `resolve`, ``conditions`` from `encode`, a row a run.
        """
        session = self.session()
        samples = self.admit(session, runs, conditions)
        denoise(session, samples, on_step)
        return np.stack([session.retire(sample) for sample in samples]), [sample.trace for sample in samples]

    def decode(self, latents: FloatArray, on_frame: OnFrame | None = None) -> list[Frames]:
        """The frames of latents (B, C, H, W), one of each, or of clips' (B, C, F, H, W)."""
        return self._decoder(latents, on_frame)

    def tiled(self, size: shapes.Size) -> bool:
        """Whether pictures or clips of a size are decoded in tiles."""
        sizes = shapes.to_symbols(self.bundle.manifest.latent, size.by_name())
        return len(self._decoder.tiling(sizes["H"], sizes["W"], 1)) > 1

    def policy(
        self,
        text: str,
        *,
        steps: int | None = None,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
    ) -> Policy:
        """A policy from its written form, with the bundle's calibration for the steps and size, or its defaults."""
        manifest = self.bundle.manifest
        size = manifest.size(height=height, width=width, frames=frames)
        sigmas = self.sigmas(steps or manifest.sampler.steps, **size.by_name())
        return bundle_policy(text, manifest, sigmas, size=size, backend=str(self.backend))

    def sigmas(
        self, steps: int, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> FloatArray:
        """The noise levels of a run at a size, one more than there are steps; the last is 0."""
        manifest = self.bundle.manifest
        size = manifest.size(height=height, width=width, frames=frames)
        return run_sigmas(manifest, steps, shapes.to_symbols(manifest.latent, size.by_name()))

    def costs(self, size: shapes.Size) -> Costs:
        """What pictures of a size cost here; measured by the first call, where no calibration has."""
        return self._known_costs(size)

    def within_budget(self, run: Run, start: float, clock: Callable[[], float] = perf_counter) -> Run:
        """The run under the policy that its time budget leaves it, from ``start`` on the clock on.

        The run itself where it has none. Measures the levels where their costs are not known. Raises `UsageError` for a
        budget that is too short.
        """
        if run.budget is None:
            return run
        costs = self.costs(run.size)
        manifest, backend = self.bundle.manifest, str(self.backend)
        info = manifest.prediction(steps=run.steps, size=run.size, backend=backend)
        known = manifest.calibration("adaptive", steps=run.steps, size=run.size, backend=backend)
        wanted = plan(
            run.budget,
            costs,
            run.steps,
            native=manifest.native,
            default=Adaptive(info.tolerance, info.order),
            curve=known.curve if known else (),
        )
        return run.under(Budgeted(wanted, costs, run.steps, start + run.budget - costs.decode / 1000, clock))
