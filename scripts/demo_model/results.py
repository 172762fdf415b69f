"""What the demo model's training leaves behind: pictures, how many of them show their prompt, the pipeline."""

import copy
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ddit.exporter.adapter import save_adapter
from ddit.exporter.families.flux.modules import FluxLevel
from ddit.exporter.levels import Level
from ddit.runtime.files import whole
from demo_model.buckets import Bucket
from demo_model.classifier import SceneClassifier
from demo_model.course import PictureRun
from demo_model.parts import PATCH, STEPS, make_scheduler, make_tables
from demo_model.scenes import Scene, sample_scenes
from demo_model.stages import TEST_SEED, Denoiser, load_vae

# what ddit-export takes for this model where the command line says nothing
EXPORT_DEFAULTS = {
    "levels": [2, 4, 8],
    "dtype": "fp32",
    "profile": "128-384",
    "adapter": "adapter.safetensors",
    "steps": STEPS,
}
GRID = 24  # pictures


@torch.no_grad()
def sample(
    run: PictureRun,
    denoiser: Denoiser,
    level: nn.Module,
    patch: int,
    prompts: list[str],
    guidance: float,
    bucket: Bucket,
) -> Tensor:
    """Latents of prompts, 50 Euler steps at one level and picture size."""
    generator = torch.Generator().manual_seed(TEST_SEED)
    count = len(prompts)
    z = torch.randn(count, run.sizes.latent_channels, *bucket.latent, generator=generator).to(run.device)
    context, pooled = denoiser.encode(denoiser.tokenize(prompts).to(run.device))
    scheduler, steps = make_scheduler(), STEPS if run.max_steps is None else 2
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=bucket.mu)
    scale = torch.full((count,), guidance, device=run.device)
    tables = make_tables(denoiser.transformer, run.device)(patch, z.shape[2:])
    for now, after in pairwise(scheduler.sigmas.tolist()):
        sigma = torch.full((count,), now, device=run.device)
        with run.autocast():
            predicted = level(latent=z, timestep=sigma, context=context, pooled=pooled, guidance=scale, **tables)
        z = z + (after - now) * predicted
    return z


@torch.no_grad()
def decode(run: PictureRun, vae: AutoencoderKL, latent: Tensor) -> Tensor:
    """Latents → pictures (B, 3, H, W) in [-1, 1]."""
    with run.autocast():
        parts = [
            vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample for z in torch.split(latent, 25)
        ]
    return torch.cat(parts).float().clamp(-1, 1)


def evaluate(run: PictureRun, denoiser: Denoiser, levels: Mapping[int, Level], classifier: SceneClassifier) -> float:
    """How many prompts the pictures show: the best guidance scale on some, then every level on 500 others.

    Judged at the size that the classifier knows; some prompts are drawn at others, to be looked at. Writes
    ``evaluation.json`` and grids of pictures; returns the best guidance scale.
    """
    vae, native = load_vae(run), FluxLevel(denoiser.transformer, PATCH)
    square = next(bucket for bucket in run.buckets if bucket.size == (run.sizes.picture, run.sizes.picture))
    report: dict[str, dict[str, float]] = {}

    def draw(patch: int, scenes: list[Scene], guidance: float, bucket: Bucket) -> Tensor:
        prompts = [scene.caption for scene in scenes]
        level = levels.get(patch, native)
        pictures = decode(run, vae, sample(run, denoiser, level, patch, prompts, guidance, bucket))
        name = f"grid-level-{patch}-guidance-{guidance:g}-{bucket}.jpg"
        draw_grid(scenes[:GRID], pictures).save(run.out / name, quality=92)
        return pictures

    def judge(patch: int, scenes: list[Scene], guidance: float) -> float:
        name = f"level {patch}, guidance {guidance:g}, {len(scenes)} prompts"
        report[name] = adherence(classifier, draw(patch, scenes, guidance, square), scenes)
        run.say(f"{name}: { {what: round(rate, 3) for what, rate in report[name].items()} }")
        return report[name]["shape, colour and background"]

    some, others = (sample_scenes(run.test_scenes(count), TEST_SEED + n) for n, count in ((1, 200), (2, 500)))
    best = max((1.5, 2.0, 3.0, 4.0), key=lambda guidance: judge(PATCH, some, guidance))
    for patch in (PATCH, *levels):
        judge(patch, others, best)
    for bucket in run.shown:
        for patch in (PATCH, *levels):
            draw(patch, others[:GRID], best, bucket)
    with whole(run.out / "evaluation.json") as part:
        part.write_text(json.dumps(report, indent=2), encoding="utf-8")
    return best


def adherence(classifier: SceneClassifier, pictures: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Shares of pictures that show what was asked for: in each respect, in all that count, and on every background."""
    judged = classifier.judge(pictures, scenes)
    rates = {what: sum(values) / len(values) for what, values in judged.items()}
    right = [all(asked) for asked in zip(judged["shape"], judged["colour"], judged["background"], strict=True)]
    rates["shape, colour and background"] = sum(right) / len(right)
    for kind in sorted({scene.background for scene in scenes}):
        of_kind = [one for one, scene in zip(right, scenes, strict=True) if scene.background == kind]
        rates[kind] = sum(of_kind) / len(of_kind)
    return rates


def draw_grid(scenes: list[Scene], pictures: Tensor, columns: int = 6) -> Image.Image:
    """Pictures with their captions."""
    (height, width), caption = pictures.shape[-2:], 22
    rows = -(-len(scenes) // columns)
    grid = Image.new("RGB", (columns * width, rows * (height + caption)), "white")
    draw = ImageDraw.Draw(grid)
    for i, (scene, picture) in enumerate(zip(scenes, pictures, strict=False)):
        x, y = i % columns * width, i // columns * (height + caption)
        pixels = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        grid.paste(Image.fromarray(pixels), (x, y))
        draw.text((x + 4, y + height + 4), scene.caption[: width // 6], fill="black")
    return grid


def save_model(run: PictureRun, denoiser: Denoiser, levels: Mapping[int, Level]) -> Path:
    """Write the pipeline in half precision, with its adapter where there are levels, as a diffusers folder."""
    folder = run.out / "model"
    pipeline = FluxPipeline(
        scheduler=make_scheduler(),
        vae=load_vae(run).cpu(),
        text_encoder=copy.deepcopy(denoiser.clip).cpu(),
        tokenizer=denoiser.clip_tokenizer,
        text_encoder_2=copy.deepcopy(denoiser.t5).cpu(),
        tokenizer_2=denoiser.t5_tokenizer,
        transformer=copy.deepcopy(denoiser.transformer).cpu(),
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    if levels:
        save_adapter(folder / "adapter.safetensors", levels, base_model="demo", family="flux", dtype=torch.float16)
    return folder


def save_defaults(folder: Path, guidance: float) -> None:
    """Write the file that tells ddit-export what to take where the command line says nothing."""
    (folder / "ddit.json").write_text(json.dumps({**EXPORT_DEFAULTS, "guidance": guidance}, indent=2) + "\n")
