"""A tiny run of all training stages, and the pipeline that it leaves behind."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import FluxPipeline, FluxTransformer2DModel

import train_demo
from conftest import run
from ddit.exporter.adapter import load_adapter
from ddit.exporter.families.flux.modules import FEED_FORWARD, FluxLevel
from ddit.exporter.levels import AdapterConfig
from ddit.exporter.models import find_model
from demo_model import parts
from demo_model.classifier import SceneClassifier
from demo_model.results import sample, save_model
from demo_model.scenes import render, sample_scenes
from demo_model.stages import TEST_SEED, Denoiser, Run

SIZES = parts.TINY
PROMPT = "two small red stars on a striped background"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("train") / "demo"
    result = run(train_demo.main, "--out", out, "--preset", "tiny", "--no-compile")
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def saved(trained, tmp_path) -> tuple[Run, Denoiser]:
    """A pipeline with random weights everywhere; two steps leave the velocity near 0, which would hide mistakes."""
    (tmp_path / "vae").symlink_to(trained / "vae")
    AcceleratorState._reset_state(reset_partial_state=True)  # the training before may have been in bfloat16
    exact = Accelerator(mixed_precision="no")
    settings = Run(out=tmp_path, sizes=SIZES, scenes=2, batch=2, max_steps=2, accelerator=exact)
    denoiser = Denoiser(SIZES)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_model(settings, denoiser, {})
    return settings, denoiser.eval()


def test_all_stages_leave_their_results(trained):
    assert (trained / "vae" / "config.json").exists()
    assert {path.name for path in trained.glob("*.pt")} == {"flow.pt", "guidance.pt", "adapter.pt"}
    assert {path.suffix for path in (trained / "model").rglob("*") if path.is_file()} == {".json", ".safetensors"}
    report = json.loads((trained / "evaluation.json").read_text())
    assert {name.split(",")[0] for name in report} == {"level 2", "level 4", "level 8"}
    defaults = find_model(str(trained / "model")).defaults
    assert defaults.levels == (2, 4, 8)
    assert f"level 2, guidance {defaults.guidance:g}" in report
    assert all(0 <= rate <= 1 for rates in report.values() for rate in rates.values())
    assert list(trained.glob("grid*.png"))


def test_adapter_fits_the_model(trained):
    adapter = load_adapter(trained / "model" / "adapter.safetensors")
    transformer = FluxTransformer2DModel.from_pretrained(trained / "model" / "transformer")
    assert set(adapter.configs) == {4, 8}
    for patch, config in adapter.configs.items():
        assert config == AdapterConfig(targets=FEED_FORWARD)
        adapter.apply(FluxLevel(transformer, patch, config), patch)


def test_the_classifier_knows_rendered_scenes():
    scenes = sample_scenes(200, seed=11)
    judged = SceneClassifier.load().judge(render(scenes), scenes)
    right = [all(values) for values in zip(*judged.values(), strict=True)]
    assert sum(right) / len(right) >= 0.98


def test_a_finished_stage_is_not_run_again(trained, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("this stage had finished")

    for stage in ("stage_vae", "stage_flow", "stage_guidance"):
        monkeypatch.setattr(train_demo, stage, fail)
    result = run(train_demo.main, "--out", trained, "--preset", "tiny", "--no-compile")
    assert result.exit_code == 0, result.output


def test_tokens_are_those_of_the_saved_pipeline(saved):
    settings, denoiser = saved
    pipeline = FluxPipeline.from_pretrained(settings.out / "model")
    ids = denoiser.tokenize([PROMPT, ""])
    for row, tokenizer in enumerate((pipeline.tokenizer, pipeline.tokenizer_2)):
        again = tokenizer([PROMPT, ""], padding="max_length", max_length=parts.TEXT_LENGTH, return_tensors="pt")
        assert torch.equal(ids[:, row], again.input_ids)
        assert tokenizer.model_max_length == parts.TEXT_LENGTH
    assert not (ids[:, 1] == denoiser.t5_tokenizer.unk_token_id).any()
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id  # where CLIP pools


def test_sampler_agrees_with_the_saved_pipeline(saved):
    settings, denoiser = saved
    pipeline = FluxPipeline.from_pretrained(settings.out / "model", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    # the tiny picture has 16 tokens where the demo's has 256, and the shift of the noise levels follows their number
    pipeline.scheduler.register_to_config(base_image_seq_len=16)
    native = FluxLevel(denoiser.transformer, parts.PATCH)
    ours = sample(settings, denoiser, native, parts.PATCH, [PROMPT], guidance=3.0)

    side, channels = SIZES.picture // 8, SIZES.latent_channels
    noise = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(TEST_SEED))
    theirs = pipeline(
        PROMPT,
        height=SIZES.picture,
        width=SIZES.picture,
        num_inference_steps=2,
        guidance_scale=3.0,
        max_sequence_length=parts.TEXT_LENGTH,
        latents=FluxPipeline._pack_latents(noise, 1, channels, side, side),
        output_type="latent",
    ).images
    theirs = FluxPipeline._unpack_latents(theirs, SIZES.picture, SIZES.picture, 8)
    assert (ours - noise).abs().max() > 0.1  # the model does something
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=5e-3)  # the saved weights are rounded to half precision
