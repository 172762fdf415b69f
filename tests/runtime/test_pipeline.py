"""The loop: determinism, batches, threads, levels, and agreement with diffusers."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from conftest import run
from ddit.exporter.cli import main as export
from ddit.runtime import Pipeline, Request
from ddit.runtime.denoise import Progress
from ddit.runtime.errors import UsageError
from ddit.runtime.policies import Fixed
from ddit.runtime.samplers.sigmas import noise

SIZE = {"height": 128, "width": 64}


@pytest.fixture(scope="module")
def pipeline(tiny_bundle) -> Pipeline:
    return Pipeline.open(tiny_bundle)


@torch.no_grad()
def diffusers_latent(folder, prompt: str, seed: int, steps: int, guidance: float) -> np.ndarray:
    """The latent that diffusers' own pipeline makes from our noise."""
    reference = FluxPipeline.from_pretrained(folder)
    reference.set_progress_bar_config(disable=True)
    start = torch.from_numpy(noise(seed, (1, 4, 16, 8)))
    packed = FluxPipeline._pack_latents(start, 1, 4, 16, 8)
    out = reference(
        prompt,
        **SIZE,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=packed,
        max_sequence_length=16,
        output_type="latent",
    ).images
    return FluxPipeline._unpack_latents(out, 128, 64, 8)[0].numpy()


def test_the_native_schedule_is_diffusers(pipeline, tiny_pipeline):
    result = pipeline("a red circle", seed=3, steps=8, schedule="native", guidance=2.5, **SIZE)
    expected = diffusers_latent(tiny_pipeline, "a red circle", 3, 8, 2.5)
    np.testing.assert_allclose(result.latent, expected, atol=2e-4 * np.abs(expected).max())


def test_schnell_takes_no_guidance_and_another_shift(tiny_schnell, tmp_path):
    out = tmp_path / "schnell.bundle"
    options = ("--levels", "2,4", "--dtype", "fp32", "--profile", "256", "--out", out, "--json")
    result = run(export, "flux", "--model", tiny_schnell, *options)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["levels"], report["untrained"]) == ([2, 4], [4])
    assert "no adapter for level 4: pictures will suffer" in result.stderr
    schnell = Pipeline.open(out)
    assert "guidance" not in {spec.name for spec in schnell.bundle.graph("level-2").inputs}
    assert [level.trained for level in schnell.bundle.manifest.levels] == [True, False]
    result = schnell("a red circle", seed=3, schedule="native", **SIZE)
    assert len(result.trace.steps) == 4
    expected = diffusers_latent(tiny_schnell, "a red circle", 3, 4, 0.0)
    np.testing.assert_allclose(result.latent, expected, atol=2e-4 * np.abs(expected).max())
    with pytest.raises(UsageError, match="takes no guidance"):
        schnell("a red circle", guidance=3.0, **SIZE)


def test_a_seed_makes_the_same_picture(pipeline):
    options = {"seed": 5, "steps": 5, "schedule": "fixed:8x2,4x1,2x2", **SIZE}
    options.pop("steps")
    first, second = (pipeline("a blue star", **options) for _ in range(2))
    assert np.array_equal(first.latent, second.latent)
    assert first.trace.levels == [8, 8, 4, 2, 2]
    assert not np.array_equal(first.latent, pipeline("a blue star", **{**options, "seed": 6}).latent)


def test_every_sample_of_a_batch_follows_its_own_schedule(pipeline):
    prompts, seeds = ["a red circle", "a green square", "a blue star"], [1, 2, 3]
    alone = [pipeline(p, seed=s, steps=6, schedule="native", **SIZE) for p, s in zip(prompts, seeds, strict=True)]
    # a threshold between the samples' statistics, so that they part ways after the warm-up
    statistics = sorted(one.trace.steps[2].statistic[8] for one in alone)
    tau = (statistics[0] + statistics[1]) / 2
    together = pipeline.batch(prompts, seeds=seeds, steps=6, schedule=f"dynamic:tau={tau}", **SIZE)
    levels = [result.trace.levels for result in together]
    assert len({tuple(one) for one in levels}) > 1
    for prompt, seed, result in zip(prompts, seeds, together, strict=True):
        single = pipeline(prompt, seed=seed, steps=6, schedule=f"dynamic:tau={tau}", **SIZE)
        assert single.trace.levels == result.trace.levels
        np.testing.assert_allclose(single.latent, result.latent, atol=1e-3 * np.abs(single.latent).max())


def test_threads_may_share_a_pipeline(tiny_bundle):
    shared = Pipeline.open(tiny_bundle)
    options = {"steps": 4, "schedule": "fixed:2x1,4x1,8x2", **SIZE}
    with ThreadPoolExecutor(4) as pool:
        latents = list(pool.map(lambda seed: shared("a red circle", seed=seed % 2, **options).latent, range(8)))
    for index, latent in enumerate(latents):
        assert np.array_equal(latent, latents[index % 2])


def test_levels_are_opened_when_first_used(tiny_bundle):
    fresh = Pipeline.open(tiny_bundle)
    fresh("a red circle", steps=3, schedule="native", **SIZE)
    assert {name for name in fresh.backend._engines if name.startswith("level")} == {"level-2"}


def test_progress_is_reported_with_the_level(pipeline):
    seen = []

    def watch(progress: Progress) -> None:
        seen.append((progress.step, progress.steps, progress.levels))

    pipeline("a star", schedule="fixed:4x2,2x1", on_step=watch, **SIZE)
    assert seen == [(0, 3, [4]), (1, 3, [4]), (2, 3, [2])]


def test_steps_must_fit_a_fixed_schedule(pipeline):
    with pytest.raises(UsageError, match="has 3 steps, not 4"):
        pipeline("a star", schedule="fixed:4x2,2x1", steps=4, **SIZE)


def test_text_length_is_free(pipeline):
    result = pipeline("a red circle", steps=3, text_length=40, **SIZE)
    assert np.isfinite(result.latent).all()
    with pytest.raises(UsageError, match="outside the bundle's profile"):
        pipeline("a red circle", steps=3, text_length=8, **SIZE)


def test_detail_is_carried_from_native_steps_into_coarse_ones(pipeline):
    def latent(carry: float | None, *levels: int) -> np.ndarray:
        return pipeline("a red circle", seed=3, schedule=Fixed(levels), carry=carry, **SIZE).latent

    np.testing.assert_array_equal(latent(1.0, 2, 2, 2), latent(0.0, 2, 2, 2))
    np.testing.assert_array_equal(latent(1.0, 4, 4, 4), latent(0.0, 4, 4, 4), "there is nothing to carry yet")
    plain, carried = latent(0.0, 2, 4, 4), latent(1.0, 2, 4, 4)
    assert not np.array_equal(plain, carried)
    np.testing.assert_array_equal(latent(None, 2, 4, 4), latent(pipeline.bundle.manifest.carry, 2, 4, 4))


def test_carry_is_a_share(pipeline):
    with pytest.raises(UsageError, match=r"carry must lie between 0 and 1, not 1\.5"):
        pipeline("a red circle", carry=1.5, **SIZE)


@torch.no_grad()
def test_every_step_s_latent_is_that_of_diffusers(pipeline, tiny_pipeline):
    """Also where the run starts from a latent that was given, and not from a seed."""
    start = np.random.default_rng(9).standard_normal((4, 16, 8), dtype=np.float32)
    ours, theirs = [], []
    pipeline(
        "a red circle",
        steps=5,
        schedule="native",
        guidance=2.5,
        latent=start,
        on_step=lambda progress: ours.append(progress.latents()[0]),
        **SIZE,
    )

    def look(pipe, step, timestep, values):
        theirs.append(FluxPipeline._unpack_latents(values["latents"], 128, 64, 8)[0].numpy())
        return values

    original = FluxPipeline.from_pretrained(tiny_pipeline)
    original.set_progress_bar_config(disable=True)
    original(
        "a red circle",
        **SIZE,
        num_inference_steps=5,
        guidance_scale=2.5,
        latents=FluxPipeline._pack_latents(torch.from_numpy(start)[None], 1, 4, 16, 8),
        max_sequence_length=16,
        callback_on_step_end=look,
        output_type="latent",
    )
    assert len(ours) == len(theirs) == 5
    for latent, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(latent, expected, atol=2e-4 * np.abs(expected).max())


def test_a_run_goes_on_where_another_was_left(pipeline):
    options = {"steps": 6, "schedule": "native", **SIZE}
    seen = []
    whole = pipeline("a star", seed=4, on_step=lambda progress: seen.extend(progress.latents()), **options)
    rest = pipeline("a star", latent=seen[2], first_step=3, **options)
    np.testing.assert_array_equal(rest.latent, whole.latent)
    assert [record.step for record in rest.trace.steps] == [3, 4, 5]
    assert rest.trace.steps[0].statistic == {}, "its differences start anew"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"latent": np.zeros((4, 8, 8))}, r"the latent has shape \(4, 8, 8\), a picture of 128×64 needs \(4, 16, 8\)"),
        ({"first_step": 2}, "needs the latent to go on from"),
        ({"first_step": 4, "steps": 4}, "the first step must lie between 0 and 3, not 4"),
    ],
)
def test_latents_that_do_not_fit_are_refused(pipeline, options, words):
    with pytest.raises(UsageError, match=words):
        pipeline("a star", **{"steps": 4, **options}, **SIZE)


def test_encode_denoise_and_decode_are_what_a_call_does(pipeline):
    requests = [Request("a red circle", 1, 3, "native", **SIZE), Request("a blue star", 2, 3, "native", **SIZE)]
    conditions = pipeline.encode([request.prompt for request in requests])
    assert conditions["context"].shape == (2, 16, 24)
    assert conditions["pooled"].shape == (2, 20)
    latents, traces = pipeline.denoise(pipeline.resolve(requests), conditions)
    pictures = pipeline.decode(latents)
    for request, latent, trace, (image,) in zip(requests, latents, traces, pictures, strict=True):
        assert trace.levels == [2, 2, 2]
        alone = pipeline(request.prompt, seed=request.seed, steps=3, schedule="native", **SIZE)
        np.testing.assert_allclose(latent, alone.latent, atol=1e-5 * np.abs(latent).max())
        assert np.abs(np.asarray(image, int) - np.asarray(alone.image)).max() <= 1


@pytest.mark.parametrize(
    "asked",
    [
        *({"seed": None}, {"seed": -1}, {"seed": 1.5}, {"seed": True}, {"steps": 0}, {"steps": "4"}, {"height": 0}),
        *({"text_length": 0}, {"guidance": float("inf")}, {"carry": "much"}, {"budget": float("nan")}, {"budget": 0}),
        *({"schedule": 1}, {"first_step": -1}, {"latent": "noise"}, {"latent": np.full((4, 16, 8), np.nan)}),
        *({"schedule": Fixed(())}, {"schedule": Fixed((2,) * 10_001)}),
    ],
)
def test_requests_that_are_none_are_refused(pipeline, asked):
    with pytest.raises(UsageError):
        pipeline("a star", **{**SIZE, **asked})


@pytest.mark.parametrize(("prompts", "seeds"), [("abc", [1, 2, 3]), (["a"], 1), ([None], [1]), ([], [])])
def test_a_batch_is_of_lists(pipeline, prompts, seeds):
    with pytest.raises(UsageError):
        pipeline.batch(prompts, seeds=seeds, steps=1, **SIZE)


def test_a_trace_is_json_whatever_happened(pipeline):
    trace = pipeline("a star", steps=3, seed=np.int64(3), **SIZE).trace
    trace.steps[0].statistic[4] = float("nan")
    trace.decode_milliseconds = float("inf")

    def refuse(constant):
        raise AssertionError(constant)

    values = json.loads(trace.to_json(), parse_constant=refuse)
    assert values["steps"][0]["statistic"]["4"] is None
