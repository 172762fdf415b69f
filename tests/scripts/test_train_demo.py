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
from ddit.profiles import load_profile
from demo_model import parts
from demo_model.buckets import TINY_BUCKETS
from demo_model.classifier import SceneClassifier
from demo_model.course import Course, PictureRun
from demo_model.results import sample, save_model
from demo_model.scenes import render, sample_scenes
from demo_model.stages import TEST_SEED, Denoiser, encode_scenes, share_tokenizers, start_from

SIZES = parts.TINY
SQUARE, WIDE, TALL = TINY_BUCKETS
PROMPT = "two small red stars on a striped background"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("train") / "demo"
    result = run(train_demo.main, "--out", out, "--preset", "tiny", "--no-compile")
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def saved(trained, tmp_path) -> tuple[PictureRun, Denoiser]:
    """A pipeline with random weights everywhere; two steps leave the velocity near 0, which would hide mistakes."""
    (tmp_path / "vae").symlink_to(trained / "vae")
    AcceleratorState._reset_state(reset_partial_state=True)  # the training before may have been in bfloat16
    exact = Accelerator(mixed_precision="no")
    settings = PictureRun(
        out=tmp_path, sizes=SIZES, buckets=TINY_BUCKETS, scenes=16, batch=2, max_steps=2, accelerator=exact
    )
    denoiser = Denoiser(SIZES)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_model(settings, denoiser, {})
    return settings, denoiser.eval()


def test_all_stages_leave_their_results(trained):
    assert (trained / "vae" / "config.json").exists()
    assert {path.name for path in trained.glob("*.pt")} == {"flow.pt", "guidance.pt", "adapter.pt"}
    assert not list(trained.glob("*.checkpoint"))
    assert {path.suffix for path in (trained / "model").rglob("*") if path.is_file()} == {".json", ".safetensors"}
    report = json.loads((trained / "evaluation.json").read_text())
    assert {name.split(",")[0] for name in report} == {"level 2", "level 4", "level 8"}
    defaults = find_model(str(trained / "model")).defaults
    assert defaults.levels == (2, 4, 8)
    assert f"level 2, guidance {defaults.guidance:g}, 4 prompts" in report
    assert load_profile(defaults.profile).contains(height=128, width=384)
    assert all(0 <= rate <= 1 for rates in report.values() for rate in rates.values())
    grids = {path.stem for path in trained.glob("grid*.jpg")}
    assert {
        f"grid-level-{level}-guidance-{defaults.guidance:g}-{b}" for level in (2, 4, 8) for b in TINY_BUCKETS
    } <= grids


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


def test_pictures_of_every_size_are_encoded(saved):
    settings, denoiser = saved
    data = encode_scenes(settings, denoiser)
    assert set(data) == set(TINY_BUCKETS)
    for bucket, encoded in data.items():
        assert encoded.latents.shape == (len(encoded.ids), SIZES.latent_channels, *bucket.latent)
    assert sum(len(encoded.ids) for encoded in data.values()) == settings.scenes


def test_training_begins_with_a_saved_model(saved):
    settings, denoiser = saved
    other, vae = Denoiser(SIZES), parts.make_vae(SIZES)
    settings.out = settings.out / "again"
    model = settings.out.parent / "model"
    start_from(model, other, vae)
    share_tokenizers(settings, other, model)
    for ours, theirs in zip(other.parameters(), denoiser.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.half().float())
    assert torch.equal(other.tokenize([PROMPT, "a"]), denoiser.tokenize([PROMPT, "a"]))


def test_all_runs_have_the_same_tokenizers(saved):
    settings, denoiser = saved
    share_tokenizers(settings, denoiser)
    again = Denoiser(SIZES)  # its tokenizer may number the tokens otherwise
    share_tokenizers(settings, again)
    assert torch.equal(again.tokenize([PROMPT, "a"]), denoiser.tokenize([PROMPT, "a"]))


def test_an_interrupted_stage_goes_on(saved, monkeypatch):
    settings, _ = saved
    monkeypatch.setattr("demo_model.course.KEEP_SECONDS", -1.0)  # after every step
    settings.max_steps = 6

    def train(stop: int) -> tuple[list[int], torch.Tensor]:
        layer = torch.nn.Linear(1, 1)
        with torch.no_grad():
            layer.weight.fill_(1)
        course, done = Course(settings, "test", layer, lr=0.1, decay=0.9), []
        for step in course.steps(1000.0):
            if step == stop:
                break
            done.append(step)
            settings.update(layer(torch.ones(1, 1)).square().sum(), course.optimizer)
        return done, layer.weight.detach()

    assert train(stop=4)[0] == [0, 1, 2, 3]
    done, weight = train(stop=6)
    assert done == [4, 5]
    assert weight.item() < 0.9  # not from the beginning


@pytest.mark.parametrize("bucket", [SQUARE, WIDE, TALL], ids=str)
def test_sampler_agrees_with_the_saved_pipeline(saved, bucket):
    settings, denoiser = saved
    pipeline = FluxPipeline.from_pretrained(settings.out / "model", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    native = FluxLevel(denoiser.transformer, parts.PATCH)
    ours = sample(settings, denoiser, native, parts.PATCH, [PROMPT], 3.0, bucket)

    channels = SIZES.latent_channels
    noise = torch.randn(1, channels, *bucket.latent, generator=torch.Generator().manual_seed(TEST_SEED))
    theirs = pipeline(
        PROMPT,
        height=bucket.height,
        width=bucket.width,
        num_inference_steps=2,
        guidance_scale=3.0,
        max_sequence_length=parts.TEXT_LENGTH,
        latents=FluxPipeline._pack_latents(noise, 1, channels, *bucket.latent),
        output_type="latent",
    ).images
    theirs = FluxPipeline._unpack_latents(theirs, *bucket.size, 8)
    assert (ours - noise).abs().max() > 0.1  # the model does something
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=5e-3)  # the saved weights are rounded to half precision
