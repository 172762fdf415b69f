"""A Wan bundle behind diffusers' own `WanPipeline`."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from ddit.runtime import Pipeline
from ddit.runtime.errors import UsageError
from ddit.runtime.interop.diffusers import DDiTTransformer
from ddit.runtime.samplers.sigmas import noise
from tiny_wan import euler, tiny_pipeline, unipc

SIZE = {"height": 64, "width": 128}
FRAMES, TEXT = 9, 16
SHAPE = (16, 3, 8, 16)  # of the latent
PROMPTS, NEGATIVE = ["a red circle on the left", "a green square"], "a blue star"
STEPS = 8
PAGE = Path(__file__).parents[3] / "docs" / "from-diffusers.md"
SOLVERS = {"unipc": unipc, "euler": euler}


def with_bundle(bundle, schedule: str, scheduler=None) -> WanPipeline:
    """The tiny pipeline with the bundle in its transformer's place."""
    pipe = tiny_pipeline(scheduler=scheduler)
    pipe.transformer = DDiTTransformer.open(bundle, pipe, schedule=schedule, backend="cpu")
    return pipe


def latents(
    pipe, *, seeds=(3,), steps: int = STEPS, guidance: float = 5.0, negative: str = NEGATIVE, **more
) -> list[np.ndarray]:
    """The latents (B, C, F, H, W) after every step of a run from seeds' noise."""
    seen = []

    def see(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].numpy().copy())
        return {}

    pipe(
        PROMPTS[: len(seeds)],
        negative_prompt=[negative] * len(seeds),
        num_frames=FRAMES,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.from_numpy(np.stack([noise(seed, SHAPE) for seed in seeds])),
        max_sequence_length=TEXT,
        output_type="latent",
        callback_on_step_end=see,
        **SIZE,
        **more,
    )
    return seen


def far(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("guidance", [5.0, 1.2, 1.0])
@pytest.mark.parametrize("scheduler", SOLVERS)
@pytest.mark.parametrize("bundle", ["wan_bundle", "wan_euler_bundle"])
def test_natively_it_is_the_pipeline(bundle, scheduler, guidance, request):
    """Whatever solver the bundle was exported with and the pipeline has."""
    plain = tiny_pipeline(scheduler=SOLVERS[scheduler]())
    ours = with_bundle(request.getfixturevalue(bundle), "native", SOLVERS[scheduler]())
    for seeds in ((3, 4), (5,)):  # a second run begins anew
        expected = latents(plain, seeds=seeds, guidance=guidance)
        found = latents(ours, seeds=seeds, guidance=guidance)
        assert len(found) == STEPS
        assert max(map(far, found, expected)) <= 1e-4
        assert [trace.levels for trace in ours.transformer.traces] == [[2] * STEPS] * len(seeds)


@pytest.mark.parametrize("guidance", [5.0, 1.0])
@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ("dynamic:tau=1e9", 8),
        ("dynamic:tau=0.9,hold=1,warmup=3", 16),
        ("adaptive:20", 20),
        ("fixed:2x3,8x2,4x3", 8),
        ("dynamic:tau=1e9+adaptive:20", 20),
    ],
)
def test_schedules_are_those_of_ddit_run(wan_bundle, schedule, steps, guidance):
    """With the bundle's own solver the run is the same whoever has the loop."""
    seen = []
    own = Pipeline.open(wan_bundle, backend="cpu")(
        PROMPTS[0],
        seed=3,
        steps=steps,
        schedule=schedule,
        guidance=guidance,
        negative_prompt=NEGATIVE if guidance > 1 else None,
        frames=FRAMES,
        on_step=lambda progress: seen.append(progress.latents()),
        **SIZE,
    )
    ours = with_bundle(wan_bundle, schedule)
    found = latents(ours, steps=steps, guidance=guidance)
    (trace,) = ours.transformer.traces
    assert trace.levels == own.trace.levels
    assert len(set(trace.levels)) > 1
    assert max(far(one, np.stack(other)) for one, other in zip(found, seen, strict=True)) <= 1e-3


def test_a_scale_that_changes_between_runs_is_the_pipeline_s(wan_bundle):
    plain, ours = tiny_pipeline(), with_bundle(wan_bundle, "native")
    for guidance in (4.0, 1.0, 2.0):
        assert far(latents(ours, guidance=guidance)[-1], latents(plain, guidance=guidance)[-1]) <= 1e-4
        assert ours.transformer.traces[0].guidance == guidance


def test_a_run_that_was_given_up_leaves_nothing(wan_bundle):
    ours = with_bundle(wan_bundle, "dynamic:tau=1e9")
    expected = latents(ours)

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 3
        return tensors

    ours(
        PROMPTS[0], **SIZE, num_frames=FRAMES, num_inference_steps=STEPS, max_sequence_length=TEXT,
        callback_on_step_end=stop, output_type="latent",
    )  # fmt: skip
    assert len(ours.transformer.traces[0].steps) == 4
    assert np.array_equal(latents(ours)[-1], expected[-1])


def test_frames_come_out(wan_bundle):
    clip = with_bundle(wan_bundle, "adaptive")(
        PROMPTS[0], **SIZE, num_frames=FRAMES, num_inference_steps=4, max_sequence_length=TEXT
    ).frames
    assert clip.shape == (1, FRAMES, 64, 128, 3)


def test_what_it_cannot_do_is_refused(wan_bundle, tiny_bundle):
    plain = tiny_pipeline()
    with pytest.raises(UsageError, match=r"give DDiTTransformer\.open the pipeline itself"):
        DDiTTransformer.open(wan_bundle, plain.scheduler, backend="cpu")
    with pytest.raises(UsageError, match="a flux bundle cannot stand in for the transformer of WanPipeline"):
        DDiTTransformer.open(tiny_bundle, plain, backend="cpu")
    growing = with_bundle(wan_bundle, "progressive")
    with pytest.raises(UsageError, match="makes the latent grow"):
        growing(PROMPTS[0], height=128, width=128, num_frames=5, num_inference_steps=4, max_sequence_length=TEXT)
    every_token = tiny_pipeline()
    every_token.register_to_config(expand_timesteps=True)
    every_token.transformer = DDiTTransformer.open(wan_bundle, every_token, backend="cpu")
    with pytest.raises(UsageError, match="a noise level for every token"):
        latents(every_token, steps=2)


def test_the_page_s_python(tiny_bundle, tiny_wan, wan_bundle, tmp_path, monkeypatch, request):
    """docs/from-diffusers.md, for both models."""
    monkeypatch.chdir(tmp_path)
    for name, path in {
        "FLUX.1-dev": request.getfixturevalue("tiny_pipeline"),
        "flux.bundle": tiny_bundle,
        "Wan2.1-T2V-1.3B-Diffusers": tiny_wan,
        "wan.bundle": wan_bundle,
    }.items():
        (tmp_path / name).symlink_to(path)
    examples = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        names: dict[str, Any] = {}
        exec(compile(example, PAGE.name, "exec"), names)
        size = {"num_frames": 5} if "Wan" in example else {}
        names["pipe"]("a star", height=64, width=64, num_inference_steps=2, max_sequence_length=TEXT, **size)
        assert names["pipe"].transformer.traces[0].levels == [2, 2]
