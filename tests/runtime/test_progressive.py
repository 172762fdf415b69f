"""Runs on a latent that grows, beside a plain loop over the bundle's engines and SciPy's cosine transform."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.fft import dctn, idctn

from ddit.runtime import Pipeline, Request
from ddit.runtime.bundle.manifest import SpectrumInfo
from ddit.runtime.conditioning.positions import level_tables
from ddit.runtime.errors import UsageError
from ddit.runtime.policies import Progressive

SIZE = {"height": 256, "width": 128}
PROMPT, SEED, STEPS = "a red circle", 3, 10


@pytest.fixture(scope="module")
def pipeline(tiny_bundle) -> Pipeline:
    return Pipeline.open(tiny_bundle, backend="cpu")


def plain_loop(pipeline: Pipeline, grows_at: dict[int, tuple[int, int]], start: tuple[int, int]) -> np.ndarray:
    """Euler steps at the native level; before the step of a number the latent grows to a size."""
    manifest = pipeline.bundle.manifest
    sigmas = pipeline.sigmas(STEPS, **SIZE).astype(float)
    conditions = pipeline.encode([PROMPT])
    shape = (manifest.latent.channels, SIZE["height"] // 8, SIZE["width"] // 8)
    noise = dctn(np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32), norm="ortho", axes=(1, 2))
    latent = idctn(noise[:, : start[0], : start[1]], norm="ortho", axes=(1, 2))
    for step in range(STEPS):
        sigma = sigmas[step]
        if size := grows_at.get(step):
            ratio = np.sqrt(np.prod(size) / np.prod(latent.shape[1:]))
            coefficients = sigma * noise[:, : size[0], : size[1]].astype(float)
            coefficients[:, : latent.shape[1], : latent.shape[2]] = dctn(latent, norm="ortho", axes=(1, 2))
            factor = ratio / (1 + (ratio - 1) * sigma)
            latent, sigma = factor * idctn(coefficients, norm="ortho", axes=(1, 2)), sigma * factor
        height, width = latent.shape[1:]
        tables = level_tables(manifest.positions, manifest.latent, 2, 2, {"H": height, "W": width})
        velocity = pipeline.backend.engine("level-2").run(
            {
                "latent": latent[None].astype(np.float32),
                "timestep": np.array([sigma], np.float32),
                "guidance": np.array([3.5], np.float32),
                **conditions,
                **tables,
            }
        )["velocity"][0]
        latent = latent + (sigmas[step + 1] - sigma) * velocity
    return latent


def late(pipeline: Pipeline, written: str, amplitude: float = 2.0) -> Progressive:
    """A progressive schedule for pictures with little detail, whose latents grow late."""
    policy = pipeline.policy(written, **SIZE)
    assert isinstance(policy, Progressive)
    return replace(policy, spectrum=SpectrumInfo(amplitude=amplitude, exponent=1.9))


def first_at_most(sigmas: np.ndarray, level: float) -> int:
    return int(np.argmax(sigmas <= level))


def level_of(spectrum, frequency: float, delta: float) -> float:
    """t* as the paper writes it."""
    power = spectrum.amplitude * frequency**-spectrum.exponent
    return 1 / (1 + np.sqrt(delta / (power * (1 + power - delta))))


@pytest.mark.parametrize("delta", [0.05, 0.5])
def test_a_run_is_the_plain_loop(pipeline, delta):
    spectrum = pipeline.bundle.manifest.spectrum
    sigmas = pipeline.sigmas(STEPS, **SIZE)
    grows = first_at_most(sigmas, level_of(spectrum, 0.5 * 16 / 2, delta))
    assert 0 < grows < STEPS
    result = pipeline(PROMPT, seed=SEED, steps=STEPS, schedule=f"progressive:delta={delta}", guidance=3.5, **SIZE)
    expected = plain_loop(pipeline, {grows: (32, 16)}, (16, 8))
    np.testing.assert_allclose(result.latent, expected, atol=2e-5 * np.abs(expected).max())
    assert [record.scale for record in result.trace.steps] == [0.5] * grows + [1.0] * (STEPS - grows)
    assert result.trace.steps[0].size == (128, 64)
    factor = 2 / (1 + sigmas[grows])
    assert result.trace.steps[grows].sigma == pytest.approx(factor * sigmas[grows], rel=1e-6)
    assert result.image.size == (128, 256)


def test_several_scales_grow_one_after_another(pipeline):
    spectrum, schedule = pipeline.bundle.manifest.spectrum, "progressive:delta=0.5,scales=1/2-3/4"
    with pytest.raises(UsageError, match=r"1/2 and 3/4 have the same width here"):
        pipeline(PROMPT, schedule=schedule, **SIZE)
    result = pipeline(PROMPT, steps=STEPS, schedule=schedule, height=256, width=256)
    sigmas = pipeline.sigmas(STEPS, 256, 256)
    grows = [first_at_most(sigmas, level_of(spectrum, share * 32 / 2, 0.5)) for share in (0.5, 0.75)]
    assert grows[0] <= grows[1]
    expected = [0.5] * grows[0] + [0.75] * (grows[1] - grows[0]) + [1.0] * (STEPS - grows[1])
    assert [record.scale for record in result.trace.steps] == expected


def test_a_size_that_the_patches_do_not_divide_is_rounded_and_said(pipeline):
    result = pipeline(PROMPT, steps=STEPS, schedule="progressive", height=320, width=256)
    assert result.trace.steps[0].size == (128, 128), "half of 320 is not a multiple of 64"
    assert result.trace.summary()["smaller_steps"] == {"128x128": sum(r.scale == 0.5 for r in result.trace.steps)}
    grows = next(record for record in result.trace.steps if record.scale == 1)
    sigma, ratio = pipeline.sigmas(STEPS, 320, 256)[grows.step], np.sqrt(320 * 256 / 128**2)
    assert grows.sigma == pytest.approx(ratio * sigma / (1 + (ratio - 1) * sigma), rel=1e-6)


@pytest.mark.parametrize(
    ("size", "schedule", "message"),
    [
        ({"height": 64, "width": 64}, "progressive", "height of 64 has no smaller size at the scale 1/2"),
        ({"height": 256, "width": 256}, "progressive:scales=2/5-1/2", "2/5 and 1/2 have the same height here"),
    ],
)
def test_scales_that_the_levels_cannot_run_are_refused(pipeline, size, schedule, message):
    with pytest.raises(UsageError, match=message):
        pipeline.resolve([Request(PROMPT, schedule=schedule, **size)])


def test_a_scale_outside_the_profile_is_refused_before_anything_is_loaded(pipeline):
    manifest = pipeline.bundle.manifest
    entry = manifest.profile.entry[0]
    narrow = entry.model_copy(update={"height": entry.height.model_copy(update={"minimum": 192})})
    profile = manifest.profile.model_copy(update={"entry": (narrow,)})
    with pytest.raises(UsageError, match=r"scale 1/2 is 128×128, outside .* --profile that has both"):
        Request(PROMPT, schedule="progressive", height=256, width=256).resolve(
            manifest.model_copy(update={"profile": profile}), "cpu"
        )


def test_a_bundle_without_a_spectrum_says_how_to_measure_one(pipeline):
    manifest = pipeline.bundle.manifest.model_copy(update={"spectrum": None})
    with pytest.raises(UsageError, match="ddit-run spectrum"):
        Request(PROMPT, schedule="progressive").resolve(manifest, "cpu")


def test_samples_with_and_without_growing_are_as_if_alone(pipeline):
    schedules = [
        "progressive:delta=0.5",
        "native",
        "progressive:delta=0.05",
        "progressive+adaptive:tolerance=0.3",
        "fixed:2x3,4x3,8x4+progressive:delta=0.5",
        "progressive:adaptive",
        "dynamic:absolute=1,tau=0.5+progressive:delta=0.9",
    ]
    requests = [Request(PROMPT, seed, STEPS, text, **SIZE) for seed, text in enumerate(schedules)]
    results = pipeline.run(requests)
    for request, result in zip(requests, results, strict=True):
        (alone,) = pipeline.run([request])
        assert [(r.level, r.scale, r.by) for r in result.trace.steps] == [
            (r.level, r.scale, r.by) for r in alone.trace.steps
        ]
        np.testing.assert_allclose(result.latent, alone.latent, atol=2e-5 * np.abs(alone.latent).max())


def test_after_growing_other_policies_start_anew(pipeline):
    result = pipeline(PROMPT, steps=30, schedule=late(pipeline, "progressive+adaptive:tolerance=0.5"), **SIZE)
    steps = result.trace.steps
    grows = next(record.step for record in steps if record.scale == 1)
    assert any(record.level is None for record in steps[:grows])
    assert any(record.level is None for record in steps[grows:])
    assert [record.level for record in steps[grows : grows + 2]] == [2, 2], "a line needs two computed steps"
    written = "progressive+dynamic:absolute=1,tau=100,warmup=3"
    dynamic = pipeline(PROMPT, steps=12, schedule=late(pipeline, written), **SIZE)
    grows = next(record.step for record in dynamic.trace.steps if record.scale == 1)
    assert dynamic.trace.levels[grows - 1] == 8
    assert dynamic.trace.levels[grows : grows + 4] == [2, 2, 2, 8], "a difference needs three steps of its own size"


def test_a_gate_starts_anew_where_the_latent_grows(pipeline):
    """There is no change to speak of between latents of two sizes: the first step after growing is computed."""
    policy = late(pipeline, "progressive+teacache:0.9")
    result = pipeline(PROMPT, seed=SEED, steps=STEPS, schedule=policy, **SIZE)
    scales = [record.scale for record in result.trace.steps]
    grown = scales.index(1.0)
    assert 2 < grown < STEPS - 2
    assert result.trace.levels[grown] == 2
    assert "change" not in result.trace.steps[grown].figures
    assert all("change" in record.figures for record in result.trace.steps[grown + 1 :])
    assert result.trace.predicted > 0


def test_a_small_latent_goes_on_at_its_size_and_a_full_one_at_its_own(pipeline):
    request = Request(PROMPT, SEED, STEPS, "progressive:delta=0.5", **SIZE)
    seen = []
    (whole,) = pipeline.run([request], lambda done: seen.append(done.latents()[0]))
    for step in (2, STEPS - 1):
        rest = Request(PROMPT, SEED, STEPS, "progressive:delta=0.5", **SIZE, latent=seen[step - 1], first_step=step)
        (again,) = pipeline.run([rest])
        assert [r.scale for r in again.trace.steps] == [r.scale for r in whole.trace.steps[step:]]
        np.testing.assert_allclose(again.latent, whole.latent, atol=2e-5 * np.abs(whole.latent).max())
    with pytest.raises(UsageError, match="the latent has shape"):
        pipeline.resolve([Request(PROMPT, schedule="progressive", **SIZE, latent=np.zeros((4, 8, 8), np.float32))])


def test_a_latent_that_no_frequency_wants_to_grow_grows_for_the_last_step(pipeline):
    result = pipeline(PROMPT, steps=4, schedule=late(pipeline, "progressive", amplitude=1e-6), **SIZE)
    assert [record.scale for record in result.trace.steps] == [0.5] * 3 + [1.0]
