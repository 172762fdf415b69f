"""A tiny run of all the video demo's training stages, and the pipeline that it leaves behind."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import WanPipeline, WanTransformer3DModel
from PIL import Image

import train_demo_video
from conftest import run
from ddit.exporter.adapter import load_adapter
from ddit.exporter.families.wan.model import Wan
from ddit.exporter.families.wan.modules import FEED_FORWARD, WanLevel
from ddit.exporter.levels import AdapterConfig
from ddit.exporter.models import find_model
from ddit.profiles import load_profile
from demo_model.course import fitting_batch
from demo_video import parts
from demo_video.clips import balanced_clips, frame_times, render_clips
from demo_video.results import GUIDANCE, sample
from demo_video.stages import ClipRun, Denoiser, encode_data, start_from

SIZES = parts.TINY
PROMPTS = [
    "two words nobody knows",
    "",
    "a red star moving left and a blue circle growing on a drifting noisy background",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("train") / "video"
    result = run(train_demo_video.main, "--out", out, "--preset", "tiny", "--no-compile")
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def settings(trained, tmp_path) -> ClipRun:
    """Where the trained VAE lies, in float32."""
    (tmp_path / "vae").symlink_to(trained / "vae")
    AcceleratorState._reset_state(reset_partial_state=True)  # the training before may have been in bfloat16
    exact = Accelerator(mixed_precision="no")
    return ClipRun(out=tmp_path, sizes=SIZES, clips=8, batch=2, vae_batch=2, max_steps=2, accelerator=exact)


@pytest.fixture
def denoiser() -> Denoiser:
    """Random weights everywhere; two steps leave the velocity near 0, which would hide mistakes."""
    made = Denoiser(SIZES)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made.eval()


def test_all_stages_leave_their_results(trained):
    assert {path.name for path in trained.iterdir()} == {
        *("vae", "flow.pt", "adapter.pt", "model", "clips-level-2.png", "clips-level-4.png")
    }
    assert {path.suffix for path in (trained / "model").rglob("*") if path.is_file()} == {".json", ".safetensors"}
    source = find_model(str(trained / "model"))
    assert source.defaults.levels == (2, 4)
    size = {"frames": 17, "height": 128, "width": 128}
    assert load_profile(source.defaults.profile).contains(**size, text=parts.TEXT_LENGTH, batch=1)
    assert Wan(source, (2, 4), "fp32").sampler == parts.sampler_info()
    assert Image.open(trained / "clips-level-4.png").width == 5 * SIZES.side


def test_adapter_fits_the_model(trained):
    adapter = load_adapter(trained / "model" / "adapter.safetensors")
    assert adapter.family == "wan"
    assert adapter.configs == {4: AdapterConfig(targets=FEED_FORWARD)}
    transformer = WanTransformer3DModel.from_pretrained(trained / "model" / "transformer", torch_dtype=torch.float32)
    adapter.apply(WanLevel(transformer, 4, adapter.configs[4]), 4)


def test_a_finished_stage_is_not_run_again(trained, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("this stage had finished")

    for stage in ("stage_vae", "stage_flow"):
        monkeypatch.setattr(train_demo_video, stage, fail)
    result = run(train_demo_video.main, "--out", trained, "--preset", "tiny", "--no-compile")
    assert result.exit_code == 0, result.output


def test_prompts_are_encoded_as_the_pipeline_encodes_them(trained, denoiser):
    pipeline = WanPipeline.from_pretrained(trained / "model", text_encoder=denoiser.umt5, torch_dtype=torch.float32)
    assert pipeline.tokenizer.model_max_length == parts.TEXT_LENGTH
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt(
            PROMPTS, do_classifier_free_guidance=False, max_sequence_length=parts.TEXT_LENGTH
        )
        torch.testing.assert_close(denoiser.encode(denoiser.tokenize(PROMPTS)), theirs)
    assert not (denoiser.tokenize(PROMPTS[1:]) == denoiser.tokenizer.unk_token_id).any()


def test_clips_are_encoded_and_decoded_as_the_vae_does(settings, denoiser):
    vae = parts.AutoencoderKLWan.from_pretrained(settings.out / "vae")
    data = encode_data(settings, 100.0, denoiser)
    assert data.latents.shape == (settings.clips, *SIZES.latent)
    mean, deviation = parts.latent_scale(vae, torch.device("cpu"))
    with torch.no_grad():
        z = data.latents[:2].float() * deviation + mean
        torch.testing.assert_close(parts.decode_latents(vae, z).clamp(-1, 1), vae.decode(z).sample)
        pixels = render_clips(balanced_clips(2, 0), frame_times(9), SIZES.side)
        torch.testing.assert_close(parts.encode_clips(vae, pixels), vae.encode(pixels).latent_dist.mean)


def test_samples_are_those_of_the_pipeline(settings, denoiser, trained):
    """Euler steps between UniPC's noise levels: the pipeline's scheduler at order 1, without its corrector."""
    ours = sample(settings, denoiser, WanLevel(denoiser.transformer, 2), PROMPTS[2:])
    scheduler = parts.make_scheduler()
    first_order = type(scheduler).from_config({**scheduler.config, "solver_order": 1, "disable_corrector": [0, 1, 2]})
    pipeline = WanPipeline.from_pretrained(
        trained / "model",
        text_encoder=denoiser.umt5,
        transformer=denoiser.transformer,
        scheduler=first_order,
        torch_dtype=torch.float32,
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *SIZES.latent, generator=torch.Generator().manual_seed(2))
    theirs = pipeline(
        PROMPTS[2],
        height=SIZES.side,
        width=SIZES.side,
        num_frames=SIZES.frames,
        num_inference_steps=2,
        guidance_scale=GUIDANCE,
        max_sequence_length=parts.TEXT_LENGTH,
        latents=noise,
        output_type="latent",
    ).frames
    assert (ours - noise).abs().max() > 0.1  # the model does something
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_training_begins_with_a_saved_model(trained, denoiser):
    vae = parts.make_vae(SIZES)
    start_from(trained / "model", denoiser, vae)
    saved = WanPipeline.from_pretrained(trained / "model", torch_dtype=torch.float32)
    for ours, theirs in ((vae, saved.vae), (denoiser.transformer, saved.transformer)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_vae_alone_is_enough_to_begin_with(trained, denoiser):
    before = denoiser.transformer.proj_out.weight.clone()
    vae = parts.make_vae(SIZES)
    start_from(trained, denoiser, vae)
    saved = parts.AutoencoderKLWan.from_pretrained(trained / "vae")
    assert torch.equal(vae.decoder.conv_in.weight, saved.decoder.conv_in.weight)
    assert torch.equal(denoiser.transformer.proj_out.weight, before)


def test_a_batch_is_halved_until_it_fits(settings):
    tried = []

    def attempt(batch: int) -> None:
        tried.append(batch)
        if batch > 12:
            raise torch.cuda.OutOfMemoryError

    assert fitting_batch(settings, 64, attempt) == 8
    assert tried == [64, 32, 16, 8]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        fitting_batch(settings, 2, lambda _: attempt(13))


def test_a_deadline_cuts_a_stage(settings):
    assert settings.time_for(100.0) == 100.0
    assert replace(settings, deadline=0.0).time_for(100.0) == 1.0
