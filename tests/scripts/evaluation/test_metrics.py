"""Metrics against closed formulas, and what is said where pretrained weights are missing."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from ddit.runtime.errors import DditError, UsageError
from demo_model.scenes import render, sample_scenes
from evaluation import metrics
from evaluation.metrics import METRICS, Frechet, Sample, psnr, ssim, why_not
from tiny import clip_tokenizer

SAMPLES = [Sample(0, "a red circle", 0), Sample(1, "a blue star", 1)]
PRETRAINED = ("lpips", "fid", "clip", "imagereward")


def noise(count: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_identical_pictures_have_the_best_psnr_and_ssim():
    (picture,) = noise(1)
    assert psnr(picture, picture) == metrics.PSNR_CAP
    assert ssim(picture, picture) == 1.0


def test_psnr_is_its_formula():
    native = noise(1)[0] // 2
    assert psnr(native + np.uint8(3), native) == pytest.approx(10 * math.log10(255**2 / 9))


def test_ssim_falls_with_noise():
    grey = np.full((32, 32, 3), 128, dtype=np.uint8)
    assert ssim((grey + noise(1)[0] // 64), grey) > ssim((grey + noise(1)[0] // 8), grey)


class Table(nn.Module):
    """Features by number: a picture's first value is the row of a table."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = table
        self.num_features = table.shape[1]

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.table[pictures[:, 0, 0, 0].long()]


def gaussian(mean: torch.Tensor, root: torch.Tensor, count: int = 100) -> torch.Tensor:
    """Samples whose mean and covariance are exactly ``mean`` and ``root @ root.T``."""
    white = torch.randn(count, len(mean), dtype=torch.float64)
    white = torch.linalg.qr(white - white.mean(0))[0] * math.sqrt(count - 1)
    return mean + white @ root.T


def test_frechet_distance_of_two_gaussians_is_the_closed_formula():
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    a, b = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([2.0, 2.0, 1.5, 0.1]).double()  # deviations
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5]).double()
    first, second = gaussian(shift, rotation * a), gaussian(torch.zeros(4).double(), rotation * b)
    numbers = np.arange(200, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    distance = Frechet(Table(torch.cat([first, second])))
    distance.refer_to([numbers[100:150], numbers[150:]])
    # the covariances commute, so the distance is |μ₁ − μ₂|² + Σ (aᵢ − bᵢ)²
    expected = float((shift**2).sum() + ((a - b) ** 2).sum())
    assert distance([numbers[:30], numbers[30:100]]) == pytest.approx(expected, rel=1e-6)
    assert distance([numbers[100:]]) == pytest.approx(0, abs=1e-6)


def test_the_scene_distance_sees_noise():
    pictures = ((render(sample_scenes(60, seed=3), 64) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    distance = METRICS["frechet"].make()
    distance.refer_to([pictures[:30]])
    assert distance([pictures[30:]]) < distance([noise(30, 64)])


def test_adherence_is_high_for_the_right_prompts_only():
    scenes = sample_scenes(20, seed=3)
    pictures = ((render(scenes) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    right = [Sample(i, scene.caption, i, scene) for i, scene in enumerate(scenes)]
    judge = METRICS["adherence"].make()
    answers = judge(pictures, right)
    assert set(answers) == {"adherence", "shape", "colour", "background", "count"}
    assert np.mean(answers["adherence"]) >= 0.9
    assert np.mean(judge(pictures, right[1:] + right[:1])["adherence"]) <= 0.1


def test_clip_score_is_the_cosine_of_the_embeddings(tmp_path):
    tokenizer = clip_tokenizer()
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 12},
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=8,
        )
    ).eval()
    for part in (model, tokenizer, CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)):
        part.save_pretrained(tmp_path)
    pictures = noise(2)
    scores = metrics.ClipScore(tmp_path)(pictures, SAMPLES)["clip"]
    pixels = metrics.ClipScore(tmp_path).processor(images=list(pictures), return_tensors="pt").pixel_values
    text = model.get_text_features(**tokenizer([s.prompt for s in SAMPLES], return_tensors="pt")).pooler_output
    image = model.get_image_features(pixels).pooler_output
    expected = 100 * torch.cosine_similarity(image, text).clamp(min=0)
    assert scores == pytest.approx(expected.tolist(), abs=1e-3)


@pytest.mark.parametrize("name", PRETRAINED)
def test_a_missing_package_is_named_with_its_installation(monkeypatch, name):
    monkeypatch.setattr(metrics, "find_spec", lambda package: None)
    reason = why_not(METRICS[name], SAMPLES)
    assert type(reason) is DditError
    assert f"{name} needs the package {METRICS[name].pretrained.packages[0]}" in str(reason)
    assert "pip install" in str(reason)


@pytest.mark.parametrize("name", PRETRAINED)
def test_missing_weights_are_named_with_the_command_that_fetches_them(monkeypatch, tmp_path, name):
    monkeypatch.setattr(metrics, "find_spec", lambda package: object())
    monkeypatch.setattr(metrics, "in_hub_cache", lambda *_: False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    reason = why_not(METRICS[name], SAMPLES)
    assert (type(reason), reason.exit_code) == (DditError, 1)
    assert f"{name} needs pretrained weights that are not here" in str(reason)
    assert str(reason).endswith(METRICS[name].pretrained.fetch)
    assert "\n" not in str(reason)


def test_weights_in_torchs_cache_are_found(monkeypatch, tmp_path):
    monkeypatch.setattr(metrics, "find_spec", lambda package: object())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / metrics.INCEPTION).touch()
    assert why_not(METRICS["fid"], SAMPLES) is None
    assert why_not(METRICS["lpips"], SAMPLES) is not None


def test_a_package_that_fails_to_load_ends_in_one_line(monkeypatch):
    def make() -> None:
        raise AttributeError("no such thing\nin this version")

    broken = metrics.Metric("broken", "", "paired", "lower", make)
    with pytest.raises(DditError, match=r"broken cannot be loaded: no such thing$"):
        metrics.load(broken)


def test_what_needs_scenes_or_a_set_says_so():
    assert isinstance(why_not(METRICS["adherence"], SAMPLES), UsageError)
    assert "two pictures" in str(why_not(METRICS["fid"], SAMPLES[:1]))
    assert why_not(METRICS["psnr"], SAMPLES[:1]) is None
