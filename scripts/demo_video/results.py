"""What the video demo's training leaves behind: the pipeline, and clips to look at."""

import copy
import json
from collections.abc import Mapping

import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from ddit.exporter.adapter import save_adapter
from ddit.exporter.families.wan.modules import NATIVE_PATCH, WanLevel
from ddit.exporter.levels import Level
from ddit.runtime.files import whole
from ddit.runtime.samplers.sigmas import sigmas, timesteps
from demo_model.stages import TEST_SEED
from demo_video.clips import balanced_clips
from demo_video.parts import STEPS, decode_latents, latent_scale, make_scheduler, make_tables, sampler_info
from demo_video.stages import ClipRun, Denoiser, load_vae

GUIDANCE = 2.0  # more of it changes hues in the course of a clip
# what ddit-export takes for this model where the command line says nothing
EXPORT_DEFAULTS = {
    "levels": [NATIVE_PATCH, 4],
    "dtype": "fp32",
    "profile": "demo-video",
    "adapter": "adapter.safetensors",
    "guidance": GUIDANCE,
    "steps": STEPS,
}
SHOWN = 16  # clips
SHOWN_FRAMES = 5  # of each


@torch.no_grad()
def sample(run: ClipRun, denoiser: Denoiser, level: Level, captions: list[str]) -> Tensor:
    """Latents of captions, 50 Euler steps at one level, guided by two passes."""
    sizes, steps = run.sizes, STEPS if run.max_steps is None else 2
    generator = torch.Generator().manual_seed(TEST_SEED)
    z = torch.randn(len(captions), *sizes.latent, generator=generator).to(run.device)
    ids = denoiser.tokenize(captions + [""] * len(captions)).to(run.device)
    tables = make_tables(sizes, run.device)(level.patch, z.shape[2:])
    levels, told = (of(sampler_info(), steps, sizes.tokens).tolist() for of in (sigmas, timesteps))
    with run.autocast():
        context = denoiser.encode(ids).float()
        for step, timestep in enumerate(told):
            both = torch.full((len(ids),), timestep, device=run.device)
            found = level(latent=torch.cat([z, z]), timestep=both, context=context, **tables)
            positive, negative = found.chunk(2)
            z = z + (levels[step + 1] - levels[step]) * (negative + GUIDANCE * (positive - negative))
    return z


@torch.no_grad()
def show(run: ClipRun, denoiser: Denoiser, levels: Mapping[int, Level]) -> None:
    """Draw clips of captions that nothing was trained on, at every level: ``clips-level-2.png`` and so on."""
    vae = load_vae(run)
    mean, deviation = latent_scale(vae, run.device)
    captions = [clip.caption for clip in balanced_clips(run.test_scenes(SHOWN), TEST_SEED + 1)]
    native = WanLevel(denoiser.transformer, NATIVE_PATCH)
    for level in (native, *levels.values()):
        z = sample(run, denoiser, level, captions)
        with run.autocast():
            frames = decode_latents(vae, z * deviation + mean).float().clamp(-1, 1)
        draw_strips(captions, frames).save(run.out / f"clips-level-{level.patch}.png")


def draw_strips(captions: list[str], clips: Tensor) -> Image.Image:
    """Some frames (3, height, width) of every clip side by side, below their caption."""
    (frames, height, width), above = clips.shape[2:], 14
    chosen = torch.linspace(0, frames - 1, SHOWN_FRAMES).round().long().tolist()
    picture = Image.new("RGB", (SHOWN_FRAMES * width, len(captions) * (height + above)), "white")
    draw = ImageDraw.Draw(picture)
    for row, (caption, clip) in enumerate(zip(captions, clips, strict=True)):
        top = row * (height + above)
        draw.text((2, top), caption, fill="black")
        strip = torch.cat([clip[:, frame] for frame in chosen], dim=-1)
        pixels = ((strip + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        picture.paste(Image.fromarray(pixels), (0, top + above))
    return picture


def save_model(run: ClipRun, denoiser: Denoiser, levels: Mapping[int, Level]) -> None:
    """Write the pipeline in half precision, with its adapter where there are levels, as a diffusers folder."""
    folder = run.out / "model"
    pipeline = WanPipeline(
        tokenizer=denoiser.tokenizer,
        text_encoder=copy.deepcopy(denoiser.umt5).cpu(),
        vae=load_vae(run).cpu(),
        scheduler=make_scheduler(),
        transformer=copy.deepcopy(denoiser.transformer).cpu(),
    )
    for part in (pipeline.text_encoder, pipeline.vae, pipeline.transformer):
        part.half()
    pipeline.save_pretrained(folder)
    if levels:
        save_adapter(folder / "adapter.safetensors", levels, base_model="demo-video", family="wan", dtype=torch.float16)
        with whole(folder / "ddit.json") as part:
            part.write_text(json.dumps(EXPORT_DEFAULTS, indent=2) + "\n", encoding="utf-8")
