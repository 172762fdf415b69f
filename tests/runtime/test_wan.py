"""Wan 2.1's bundle beside diffusers' `WanPipeline`: every step's latent, the frames, and what else a clip can do."""

import json
import multiprocessing

import av
import numpy as np
import pytest
import torch
from PIL import Image

import clip_memory
from conftest import run
from ddit.runtime import Pipeline
from ddit.runtime.cli import main
from ddit.runtime.errors import UsageError
from ddit.runtime.request import Request
from tiny_wan import euler, tiny_pipeline

PROMPT, OTHER = "a red circle on the left", "a blue star"
SMALL = {"height": 64, "width": 64, "frames": 5}
LARGER = {"height": 64, "width": 128, "frames": 9}
STEPS = 6
TEXT = 16  # tokens


@pytest.fixture(scope="module")
def pipeline(wan_bundle) -> Pipeline:
    return Pipeline.open(wan_bundle, backend="cpu")


@pytest.fixture(scope="module")
def euler_pipeline(wan_euler_bundle) -> Pipeline:
    return Pipeline.open(wan_euler_bundle, backend="cpu")


def theirs(scheduler, start: np.ndarray, *, height: int, width: int, frames: int, guidance: float, negative: str):
    """diffusers' latents after every step, and its frames (F, H, W, 3) in [0, 1]."""
    latents = []
    clip = tiny_pipeline(scheduler=scheduler)(
        PROMPT,
        negative_prompt=negative,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=torch.from_numpy(start)[None],
        max_sequence_length=TEXT,
        callback_on_step_end=lambda pipe, step, timestep, tensors: latents.append(tensors["latents"][0].numpy()) or {},
        output_type="np",
    ).frames[0]
    return latents, clip


@pytest.mark.parametrize("size", [SMALL, LARGER])
@pytest.mark.parametrize(("guidance", "negative"), [(5.0, ""), (3.0, OTHER), (1.0, "")])
@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_native_steps_and_frames_are_diffusers(pipeline, euler_pipeline, solver, guidance, negative, size):
    own = pipeline if solver == "unipc" else euler_pipeline
    seen = []
    result = own(
        PROMPT,
        seed=3,
        steps=STEPS,
        schedule="native",
        guidance=guidance,
        negative_prompt=negative or None,
        on_step=lambda progress: seen.append(progress.latents()[0]),
        **size,
    )
    (request,) = own.resolve([Request(PROMPT, seed=3, steps=STEPS, schedule="native", **size)])
    start = request.start(seen[0].shape, seen[0].shape)
    scheduler = euler() if solver == "euler" else None
    expected, clip = theirs(scheduler, start, guidance=guidance, negative=negative, **size)
    for latent, other in zip(seen, expected, strict=True):
        assert np.linalg.norm(latent - other) <= 1e-4 * np.linalg.norm(other)
    assert len(result.frames) == size["frames"]
    frames = np.stack([np.asarray(frame) for frame in result.frames])
    assert np.abs(frames / 255 - clip).max() <= 1 / 255


def test_a_level_runs_as_long_as_a_switch_shows(pipeline, euler_pipeline):
    assert pipeline.bundle.manifest.schedule.hold == 5, "UniPC's steps look at two estimates before them"
    assert euler_pipeline.bundle.manifest.schedule.hold == 3


def test_clips_in_a_batch_are_as_if_alone(pipeline):
    """Guided and not, under different policies: what they share a call with does not show."""
    requests = [
        Request(PROMPT, 1, 8, "native", **SMALL),
        Request(OTHER, 2, 8, "adaptive:0.3", **SMALL, negative_prompt="a green square"),
        Request(OTHER, 3, 8, "fixed:2x4,4x2,8x2", **SMALL, guidance=1.0),
    ]
    for request, result in zip(requests, pipeline.run(requests), strict=True):
        (alone,) = pipeline.run([request])
        assert alone.trace.levels == result.trace.levels
        np.testing.assert_allclose(result.latent, alone.latent, atol=1e-4 * np.abs(alone.latent).max())


@pytest.mark.parametrize("schedule", ["adaptive:0", "teacache:0", "taylorseer:interval=1", "spectralcache:0"])
def test_nothing_is_reused_at_threshold_zero(pipeline, schedule):
    plain = pipeline(PROMPT, steps=5, schedule="native", **SMALL)
    other = pipeline(PROMPT, steps=5, schedule=schedule, **SMALL)
    assert np.array_equal(plain.latent, other.latent)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ("dynamic:tau=1e9,warmup=3", 6),
        ("teacache:1000", 6),
        ("adaptive:20", 20),
        ("dynamic:tau=1e9+adaptive:20", 20),
        ("progressive", 6),
    ],
)
def test_every_policy_runs_clips(pipeline, schedule, steps):
    result = pipeline(PROMPT, steps=steps, schedule=schedule, height=128, width=128, frames=5)
    trace = result.trace
    assert len(result.frames) == 5
    assert trace.frames == 5
    assert trace.predicted or trace.smaller_steps() or set(trace.steps_per_level()) > {2}


def test_sizes_that_cannot_be_are_refused(pipeline, tiny_bundle):
    with pytest.raises(UsageError, match=r"6 frames cannot be made.* nearest: 5 or 9"):
        pipeline(PROMPT, height=64, width=64, frames=6)
    with pytest.raises(UsageError, match="outside the bundle's profile"):
        pipeline(PROMPT, height=64, width=64, frames=85)
    with pytest.raises(UsageError, match="this model has a second-order solver already"):
        pipeline(PROMPT, schedule="adams", **SMALL)
    with pytest.raises(UsageError, match="a negative prompt needs guidance above 1"):
        pipeline(PROMPT, guidance=1.0, negative_prompt="red", **SMALL)
    pictures = Pipeline.open(tiny_bundle, backend="cpu")
    with pytest.raises(UsageError, match="which have no frames"):
        pictures(PROMPT, frames=5)
    with pytest.raises(UsageError, match="not guided by a negative prompt"):
        pictures(PROMPT, negative_prompt="red")


def test_generate_writes_a_clip_its_trace_and_maps(wan_bundle, tmp_path):
    out, trace, plot, detail = (tmp_path / name for name in ("clip.mp4", "trace.json", "plot.png", "map.png"))
    options = ("--steps", 8, "--height", 64, "--width", 128, "--frames", 9, "--schedule", "dynamic:tau=1e9", "--fps", 8)
    files = ("--out", out, "--trace", trace, "--plot", plot, "--map", detail)
    result = run(main, "generate", wan_bundle, PROMPT, *options, *files, "--json")
    assert result.exit_code == 0, result.stderr
    with av.open(out) as container:
        (stream,) = container.streams.video
        assert (stream.width, stream.height, stream.average_rate) == (128, 64, 8)
        assert len([*container.decode(stream)]) == 9
    assert json.loads(trace.read_text())["frames"] == 9
    assert Image.open(plot).size[0] > 100
    assert Image.open(detail).size[1] > Image.open(plot).size[1] / 2


def test_generate_writes_numbered_frames(wan_bundle, tmp_path):
    options = ("--steps", 2, "--schedule", "native", "--height", 64, "--width", 64, "--frames", 5)
    result = run(main, "generate", wan_bundle, PROMPT, *options, "--out", tmp_path / "%02d.png")
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number:02d}.png" for number in range(5)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "clip.avi"], "cannot hold a clip; name it clip.mp4"),
        (["--out", "."], "cannot hold a clip; name it out.mp4"),
        (["--out", "%%.png"], "no place for the frames' numbers"),
        (["--frames", "0"], "the number of frames must be at least 1"),
        (["--negative-prompt", "red", "--guidance", "1"], "a negative prompt needs guidance above 1"),
    ],
)
def test_what_cannot_be_written_or_made_is_refused_first(wan_bundle, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = run(main, "generate", wan_bundle, PROMPT, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not [*tmp_path.iterdir()]


def test_the_decoder_s_memory_does_not_grow_with_the_clip(wan_bundle):
    peaks = []
    for frames in (21, 81):
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a peak belongs to a process
            peaks.append(pool.apply(clip_memory.decode, (wan_bundle, frames)))
    print(peaks)
    assert peaks[1] <= 1.1 * peaks[0]
