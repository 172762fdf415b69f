"""The gate's last check: one native step of the whole bundle, from prompt to picture, against the original pipeline.

Every graph may be right and the bundle wrong all the same: a tokenizer that pads otherwise, positions or noise levels
that the host makes in its own way, the sign of a step.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddit.exporter.families.base import Family
from ddit.exporter.graphs.job import GraphJob, level_name
from ddit.exporter.memory import fits
from ddit.exporter.parity import (
    Report,
    accepted,
    exact_float32,
    float32_bytes,
    onnxruntime_runs,
    parity_cases,
    roomy_device,
)
from ddit.profiles import Profile
from ddit.runtime import shapes
from ddit.runtime.backends.onnxruntime.host import OnnxRuntimeEngine, open_session
from ddit.runtime.bundle.manifest import Decoder, Dtype, ParityResult, TextEncoderInfo
from ddit.runtime.bundle.names import CONDITIONAL, GUIDE, NEXT, UNCONDITIONAL, VELOCITY
from ddit.runtime.conditioning.guidance import is_guided
from ddit.runtime.conditioning.text import Tokenizer
from ddit.runtime.samplers.sigmas import noise, sigmas, timesteps
from ddit.runtime.samplers.unipc import coefficients
from ddit.runtime.tools.verify import relative_error, tolerance

log = logging.getLogger(__name__)

FloatArray = NDArray[np.float32]

NAME = "pipeline"  # in the manifest's list of parity results
PROMPTS = ("a red circle on a striped background", "two small squares")
STEPS = 2  # few, so that the first step is long and an error of the velocity is not lost in the noise


def check_pipeline(
    family: Family,
    jobs: Sequence[GraphJob],
    folder: Path,
    encoders: Sequence[TextEncoderInfo],
    profile: Profile,
    report: Report,
) -> list[ParityResult]:
    """Compare the latent after a step and its picture; nothing, with a reason in the log, where that cannot be done.

    Raises `ParityError` when an error exceeds its tolerance.
    """
    native = level_name(family.native)
    used = {native, "step", *family.decoder.graphs, *(encoder.graph for encoder in encoders)}
    used |= {GUIDE} if family.guidance.two_passes else set()
    chosen = {job.name: job for job in jobs if job.name in used}
    if reason := _why_not(list(chosen.values())):
        log.warning("the whole pipeline is not compared with the original: %s", reason)
        return []
    report("running a step of the original pipeline")
    sizes = parity_cases(family, profile)[1]
    prompts = [PROMPTS[row % len(PROMPTS)] for row in range(sizes["B"])]
    start = np.concatenate([noise(seed, _one_latent(family, sizes)) for seed in range(sizes["B"])])
    guidance = family.guidance.default
    with exact_float32():
        expected = family.original_step(
            prompts,
            start,
            steps=STEPS,
            guidance=guidance,
            text_length=sizes["L"],
            device=roomy_device(sum(map(float32_bytes, chosen.values()))),
        )
    actual = _bundle_step(family, chosen, folder, encoders, prompts, start, guidance, sizes)
    dtype: Dtype = next((job.dtype for job in chosen.values() if job.dtype != "fp32"), "fp32")
    results = []
    for tensor, graph in (("latent", native), ("image", family.decoder.graphs[0])):
        result = ParityResult(
            graph=NAME,
            tensor=tensor,
            case=0,
            sizes=sizes,
            error=relative_error(actual[tensor], expected[tensor]),
            tolerance=tolerance(graph, dtype, expected[tensor].shape),
            checked="full",
        )
        results.append(accepted(result, "the bundle as a whole"))
    return results


def _one_latent(family: Family, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of one sample's latent, the batch's axis included."""
    return shapes.resolve(family.latent.shape, {**sizes, "B": 1})


def _why_not(jobs: Sequence[GraphJob]) -> str | None:
    """Why the check cannot be done on this machine."""
    for job in jobs:
        if not onnxruntime_runs(job):
            return f"this machine's CPU cannot run graph {job.name} in {job.dtype}; try ddit-run verify on one that can"
    if not fits(sum(map(float32_bytes, jobs))):
        return "the original does not fit in this machine's memory in float32; export on a larger one to have it"
    return None


def _bundle_step(
    family: Family,
    jobs: Mapping[str, GraphJob],
    folder: Path,
    encoders: Sequence[TextEncoderInfo],
    prompts: Sequence[str],
    start: FloatArray,
    guidance: float,
    sizes: Mapping[str, int],
) -> dict[str, FloatArray]:
    """The first of `STEPS` native steps, as a host runs the bundle: the ``latent`` after it, and its ``image``.

    Of a clip the ``image`` is all frames (B, 3, frames, height, width).
    """

    def run(graph: str, **values: NDArray[np.float32] | NDArray[np.int64]) -> dict[str, FloatArray]:
        # whatever else the step graph takes is zero at first
        inputs = {
            spec.name: values.get(spec.name, np.zeros(spec.resolve(sizes), dtype=spec.dtype))
            for spec in jobs[graph].inputs
        }
        return OnnxRuntimeEngine(open_session(folder / f"{graph}.onnx"), graph).run(inputs)

    def encode(texts: Sequence[str]) -> dict[str, FloatArray]:
        conditions: dict[str, FloatArray] = {}
        for encoder in encoders:
            tokenizer = Tokenizer(folder / encoder.tokenizer.file, encoder.tokenizer)
            length = sizes["L"] if encoder.free_length else None
            ids = np.stack([tokenizer(text, length)[0] for text in texts])
            outputs = run(encoder.graph, input_ids=ids)
            conditions |= {encoder.feeds[name]: value for name, value in outputs.items()}
        return conditions

    tokens = shapes.image_tokens(family.latent, family.native, sizes)
    sampler = family.sampler
    sigma, count = sigmas(sampler, STEPS, tokens), len(prompts)
    timestep, told, dt, scale = (
        np.full(count, value, dtype=np.float32)
        for value in (sigma[0], timesteps(sampler, STEPS, tokens)[0], sigma[1] - sigma[0], guidance)
    )
    level = {"latent": start, "timestep": told, "guidance": scale}
    native = level_name(family.native)
    level |= jobs[native].tables(sizes)
    velocity = run(native, **level, **encode(prompts))[VELOCITY]
    if is_guided(family.guidance, guidance):
        other = run(native, **level, **encode([""] * count))[VELOCITY]
        guided = {CONDITIONAL: velocity, UNCONDITIONAL: other}
        velocity = run(GUIDE, guidance=scale, **guided)[VELOCITY]
    how_far = {"dt": dt}
    if sampler.kind == "flow_unipc":
        how_far = {"solver": np.array([coefficients(sigma.tolist(), 0, 0, sampler.order)] * count, np.float32)}
    latent = run("step", latent=start, velocity=velocity, timestep=timestep, **how_far)["next_latent"]
    return {"latent": latent, "image": np.clip(_decoded(run, family.decoder, latent), -1, 1)}


def _decoded(run: Callable[..., dict[str, FloatArray]], decoder: Decoder, latent: FloatArray) -> FloatArray:
    """The picture (B, 3, height, width), or all frames of the clip (B, 3, frames, height, width)."""
    if decoder.kind == "image":
        return run(decoder.graph, latent=latent)["image"]
    found: list[FloatArray] = []
    state: dict[str, FloatArray] = {}
    for number in range(latent.shape[2]):
        graph = decoder.following if number else decoder.first
        outputs = run(graph, latent_frame=latent[:, :, number : number + 1], **state)
        found.append(outputs.pop("frames"))
        state = {name.removeprefix(NEXT): value for name, value in outputs.items()}
    return np.concatenate(found, axis=2)
