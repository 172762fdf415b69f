"""What the demo model's training leaves behind: pictures, how many of them show their prompt, the pipeline."""

import copy
import json
from pathlib import Path

import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw
from torch import Tensor, nn

from ddit.exporter.adapter import save_adapter
from ddit.exporter.families.flux.modules import FluxLevel
from ddit.exporter.levels import Level
from demo_model.classifier import SceneClassifier
from demo_model.parts import PATCH, make_scheduler
from demo_model.scenes import Scene, sample_scenes
from demo_model.stages import SHIFT, TEST_SEED, Denoiser, Run, load_vae
from training.distillation import level_tables

# what ddit-export takes for this model where the command line says nothing
EXPORT_DEFAULTS = {
    "levels": [2, 4, 8],
    "dtype": "fp32",
    "profile": "256",
    "adapter": "adapter.safetensors",
    "steps": 50,
}


@torch.no_grad()
def sample(run: Run, denoiser: Denoiser, level: nn.Module, patch: int, prompts: list[str], guidance: float) -> Tensor:
    """Latents of prompts, 50 Euler steps at one level."""
    generator = torch.Generator().manual_seed(TEST_SEED)
    side, count = run.sizes.picture // 8, len(prompts)
    z = torch.randn(count, run.sizes.latent_channels, side, side, generator=generator).to(run.device)
    context, pooled = denoiser.encode(denoiser.tokenize(prompts).to(run.device))
    steps = 50 if run.max_steps is None else 2
    sigmas = torch.linspace(1, 1 / steps, steps)
    sigmas = torch.cat([SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas), torch.zeros(1)])
    scale = torch.full((count,), guidance, device=run.device)
    rotary = level_tables(denoiser.transformer, patch, z.shape[2:])
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        sigma = torch.full((count,), now, device=run.device)
        with run.autocast():
            predicted = level(z, sigma, context, pooled, *rotary, scale)
        z = z + (after - now) * predicted
    return z


def evaluate(run: Run, denoiser: Denoiser, levels: dict[int, Level], classifier: SceneClassifier) -> float:
    """How many of 200 prompts the pictures show: natively at several guidance scales, then every level at the best.

    Writes ``evaluation.json`` and grids of pictures; returns the best guidance scale.
    """
    vae = load_vae(run)
    scenes = sample_scenes(200 if run.max_steps is None else 4, TEST_SEED + 1)
    prompts = [scene.caption for scene in scenes]
    report: dict[str, dict[str, float]] = {}

    def judge(patch: int, level: nn.Module, guidance: float) -> float:
        latent = sample(run, denoiser, level, patch, prompts, guidance)
        with torch.no_grad(), run.autocast():
            decoded = [
                vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample
                for z in torch.split(latent, 25)
            ]
        name = f"level {patch}, guidance {guidance:g}"
        pictures = torch.cat(decoded).float().clamp(-1, 1)
        judged = classifier.judge(pictures, scenes)
        rates = {what: sum(values) / len(values) for what, values in judged.items()}
        asked = zip(judged["shape"], judged["colour"], judged["background"], strict=True)
        rates["shape, colour and background"] = sum(map(all, asked)) / len(scenes)
        report[name] = rates
        run.say(f"{name}: { {what: round(rate, 3) for what, rate in rates.items()} }")
        draw_grid(scenes[:24], pictures).save(run.out / f"grid-{name.replace(', ', '-').replace(' ', '-')}.png")
        return rates["shape, colour and background"]

    native = FluxLevel(denoiser.transformer, PATCH)
    best = max((1.0, 1.5, 2.0, 3.0, 4.0), key=lambda guidance: judge(PATCH, native, guidance))
    for patch, level in levels.items():
        judge(patch, level, best)
    (run.out / "evaluation.json").write_text(json.dumps(report, indent=2))
    return best


def draw_grid(scenes: list[Scene], pictures: Tensor, columns: int = 6) -> Image.Image:
    """Pictures with their captions."""
    size, caption = pictures.shape[-1], 22
    rows = -(-len(scenes) // columns)
    grid = Image.new("RGB", (columns * size, rows * (size + caption)), "white")
    draw = ImageDraw.Draw(grid)
    for i, (scene, picture) in enumerate(zip(scenes, pictures, strict=False)):
        x, y = i % columns * size, i // columns * (size + caption)
        pixels = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        grid.paste(Image.fromarray(pixels), (x, y))
        draw.text((x + 4, y + size + 4), scene.caption[: size // 6], fill="black")
    return grid


def save_model(run: Run, denoiser: Denoiser, levels: dict[int, Level]) -> Path:
    """Write the pipeline in half precision, with its adapter, as a diffusers folder."""
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
