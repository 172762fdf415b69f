"""A bundle behind diffusers' own pipelines."""

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from PIL import Image

from ddit.runtime import Pipeline
from ddit.runtime.errors import UsageError
from ddit.runtime.interop.diffusers import DDiTTransformer
from ddit.runtime.samplers.sigmas import noise

SIZE = {"height": 128, "width": 64}
STEPS = 12


@pytest.fixture
def plain(tiny_pipeline) -> FluxPipeline:
    """The pipeline as it is."""
    pipe = FluxPipeline.from_pretrained(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_bundle(tiny_pipeline, bundle, schedule: str, kind=FluxPipeline):
    """The pipeline with the bundle in its transformer's place."""
    pipe = kind.from_pretrained(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = DDiTTransformer.open(bundle, pipe.scheduler, schedule=schedule, backend="cpu")
    return pipe


def latents(pipe, seeds=(3,), steps: int = STEPS) -> np.ndarray:
    """Where a run from seeds' noise ends, (B, C, H, W)."""
    start = torch.from_numpy(np.concatenate([noise(seed, (1, 4, 16, 8)) for seed in seeds]))
    packed = FluxPipeline._pack_latents(start, len(seeds), 4, 16, 8)
    out = pipe(
        ["a red circle", "a blue star"][: len(seeds)],
        **SIZE,
        num_inference_steps=steps,
        guidance_scale=2.5,
        latents=packed,
        max_sequence_length=16,
        output_type="latent",
    ).images
    return FluxPipeline._unpack_latents(out, 128, 64, 8).numpy()


def test_natively_it_is_the_pipeline(plain, tiny_pipeline, tiny_bundle):
    ours = with_bundle(tiny_pipeline, tiny_bundle, "native")
    for _ in range(2):  # a second run begins anew
        expected, found = latents(plain, (3, 4)), latents(ours, (3, 4))
        np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
    assert [trace.levels for trace in ours.transformer.traces] == [[2] * STEPS] * 2


def test_a_run_that_was_given_up_leaves_nothing(tiny_pipeline, tiny_bundle):
    ours = with_bundle(tiny_pipeline, tiny_bundle, "dynamic:tau=1e9")
    expected = latents(ours)

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 5
        return tensors

    ours("a blue star", **SIZE, num_inference_steps=STEPS, max_sequence_length=16, callback_on_step_end=stop)
    assert len(ours.transformer.traces[0].steps) == 6
    assert np.array_equal(latents(ours), expected)


@pytest.mark.parametrize("schedule", ["dynamic:tau=1e9", "adaptive:20", "fixed:2x4,8x4,4x4", "adams"])
def test_schedules_are_those_of_ddit_run(tiny_pipeline, tiny_bundle, schedule):
    """With Euler's scheduler, whose steps ours are, the run is the same whoever has the loop."""
    steps = 20 if "adaptive" in schedule else STEPS
    own = Pipeline.open(tiny_bundle, backend="cpu")(
        "a red circle", seed=3, steps=steps, schedule=schedule, guidance=2.5, **SIZE
    )
    ours = with_bundle(tiny_pipeline, tiny_bundle, schedule)
    found = latents(ours, steps=steps)[0]
    (trace,) = ours.transformer.traces
    assert trace.levels == own.trace.levels
    assert len(set(trace.levels)) > 1 or schedule == "adams"
    np.testing.assert_allclose(found, own.latent, atol=1e-3 * np.abs(own.latent).max())


def test_a_picture_goes_in_where_the_pipeline_takes_one(tiny_pipeline, tiny_bundle):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 64, 3), dtype=np.uint8))

    def run(pipe) -> np.ndarray:
        options = {"strength": 0.5, "num_inference_steps": STEPS, "guidance_scale": 2.5, "max_sequence_length": 16}
        generator = torch.Generator().manual_seed(0)
        out = pipe("a red circle", image=picture, generator=generator, output_type="latent", **options, **SIZE)
        return out.images.numpy()

    plain = FluxImg2ImgPipeline.from_pretrained(tiny_pipeline)
    plain.set_progress_bar_config(disable=True)
    ours = with_bundle(tiny_pipeline, tiny_bundle, "native", FluxImg2ImgPipeline)
    expected, found = run(plain), run(ours)
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
    assert len(ours.transformer.traces[0].steps) == STEPS // 2


def test_what_it_cannot_do_is_refused(tiny_pipeline, tiny_bundle, wan_bundle, plain):
    few = {"num_inference_steps": 4, "max_sequence_length": 16}
    growing = with_bundle(tiny_pipeline, tiny_bundle, "progressive")
    with pytest.raises(UsageError, match="makes the latent grow"):
        growing("a red circle", height=256, width=128, **few)
    native = with_bundle(tiny_pipeline, tiny_bundle, "native")
    with pytest.raises(UsageError, match="a second pass"):
        native("a red circle", negative_prompt="blue", true_cfg_scale=2.0, **few, **SIZE)
    with pytest.raises(UsageError, match="a wan bundle cannot stand in"):
        DDiTTransformer.open(wan_bundle, plain, backend="cpu")
