"""Train the demo model from scratch: VAE, text encoders, transformer, guidance, adapter; about 20 minutes on one GPU.

    python scripts/train_demo.py --out runs/demo                           # or, on two GPUs, half the time:
    torchrun --nproc-per-node 2 scripts/train_demo.py --out runs/demo --vae-seconds 75 --flow-seconds 310 …
    cp -r runs/demo/model exporter/demo

Work: 11 M parameters and 272 tokens make about 13 GFLOP for a sample forward and backward. One H200 trains 11,000 to
13,500 samples a second in bfloat16 with torch.compile, so 10 minutes see 7 million samples of 128,000 scenes.

Stages run in order and leave their results in --out; a run that was interrupted goes on with the first unfinished one.
cuDNN's attention is switched off: its backward pass crashed for these shapes (torch 2.11, CUDA 13.0, H200).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import click
import torch
import torch.nn.functional as F
from demo_model import PATCH, TEXT_LENGTH, TINY, Sizes, make_clip, make_scheduler, make_t5, make_transformer, make_vae
from diffusers import FluxPipeline
from distillation import Distillation, States, level_tables
from PIL import Image, ImageDraw
from scene_classifier import SceneClassifier
from scenes import Scene, render, sample_scenes
from torch import Tensor, nn
from training import Ema, Training, keep

from ddit.exporter.adapter import save_adapter
from ddit.exporter.families.flux.modules import FEED_FORWARD, FluxLevel
from ddit.exporter.levels import AdapterConfig, Level

SHIFT = 1.6487  # e^0.5: what FLUX's scheduler does to the noise levels at 256 image tokens
EMPTY_CAPTION_SHARE = 0.1
TRAIN_SEED, TEST_SEED = 1, 2
# what ddit-export takes for this model where the command line says nothing
EXPORT_DEFAULTS = {
    "levels": [2, 4, 8],
    "dtype": "fp32",
    "profile": "256",
    "adapter": "adapter.safetensors",
    "steps": 50,
}


@dataclass(kw_only=True)
class Run(Training):
    """What all stages need."""

    out: Path
    sizes: Sizes
    scenes: int


class Denoiser(nn.Module):
    """The transformer and its text encoders, trained together."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.clip, self.clip_tokenizer = make_clip(sizes)
        self.t5, self.t5_tokenizer = make_t5(sizes)
        self.transformer = make_transformer(sizes)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions → ids (B, 2, TEXT_LENGTH) for CLIP and T5, as `FluxPipeline` makes them."""
        options = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True, "return_tensors": "pt"}
        ids = [tokenizer(captions, **options).input_ids for tokenizer in (self.clip_tokenizer, self.t5_tokenizer)]
        return torch.stack(ids, dim=1)

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids → context (B, L, D) and pooled vector (B, D)."""
        return self.t5(ids[:, 1])[0], self.clip(ids[:, 0]).pooler_output


def velocity(
    transformer: nn.Module, latent: Tensor, sigma: Tensor, guidance: Tensor, context: Tensor, pooled: Tensor
) -> Tensor:
    """The transformer, compiled or not, on a spatial latent (B, C, H, W), called as diffusers calls it."""
    batch, channels, height, width = latent.shape
    tokens = FluxPipeline._pack_latents(latent, batch, channels, height, width)
    image_ids = FluxPipeline._prepare_latent_image_ids(
        batch, height // PATCH, width // PATCH, latent.device, torch.float32
    )
    text_ids = torch.zeros(context.shape[1], 3, device=latent.device)
    out = transformer(tokens, context, pooled, sigma, image_ids, text_ids, guidance, return_dict=False)[0]
    return FluxPipeline._unpack_latents(out.float(), height * 8, width * 8, 8)


def random_sigma(count: int, device: torch.device) -> Tensor:
    """Noise levels: logit-normal (SD3, arXiv 2403.03206) with a uniform fifth, shifted as in sampling."""
    sigma = torch.sigmoid(torch.randn(count, device=device))
    sigma = torch.where(torch.rand(count, device=device) < 0.2, torch.rand(count, device=device), sigma)
    return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)


def noisy_batch(run: Run, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A random batch: rows of the data, z = (1 − σ) x + σ noise, σ, and the velocity noise − x that leads there."""
    rows = torch.randint(len(latents), (run.batch,), device=run.device)
    x = latents[rows].float()
    noise, sigma = torch.randn_like(x), random_sigma(run.batch, run.device)
    return rows, x.lerp(noise, sigma[:, None, None, None]), sigma, noise - x


# ---- stages ----


def stage_vae(run: Run, seconds: float) -> None:
    """L1, edges and a trace of KL, on scenes drawn on the fly."""
    vae = make_vae(run.sizes).to(run.device, memory_format=torch.channels_last)
    run.start_together(vae.parameters())
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    ema, batch = Ema(vae, 0.998), max(2, run.batch // 32)  # many small steps restore better than few large ones
    pool = sample_scenes(2000 * batch if run.device.type == "cuda" else 4 * batch, TRAIN_SEED + 100 * run.rank)
    for step in run.steps(seconds, optimizer, "vae"):
        first = step * batch % len(pool)
        pictures = render(pool[first : first + batch], run.sizes.picture, run.device)
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        with run.autocast():
            posterior = vae.encode(pictures).latent_dist
            restored = vae.decode(posterior.sample()).sample.float()
        error = restored - pictures
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = error.abs().mean() + error.square().mean() + 0.5 * edges + 1e-6 * posterior.kl().float().mean()
        run.update(loss, optimizer)
        ema.update(step)
        run.note("loss", loss)
    ema.store()

    scenes = sample_scenes(256 if run.device.type == "cuda" else 8, TEST_SEED)
    with torch.no_grad(), run.autocast():
        pictures = render(scenes, run.sizes.picture, run.device)
        latent = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in pictures.split(32)]).float()
        restored = torch.cat([vae.decode(chunk).sample for chunk in latent.split(32)]).float()
    vae.register_to_config(scaling_factor=1 / latent.std().item(), shift_factor=latent.mean().item())
    for kind in sorted({scene.background for scene in scenes}):
        rows = [i for i, scene in enumerate(scenes) if scene.background == kind]
        mse = (restored[rows].clamp(-1, 1) - pictures[rows]).square().mean()
        run.say(f"vae: {kind} scenes {10 * torch.log10(4 / mse).item():.1f} dB")
    if run.rank == 0:
        vae.save_pretrained(run.out / "vae.part")
        (run.out / "vae.part").rename(run.out / "vae")


def load_vae(run: Run) -> nn.Module:
    """The trained VAE, frozen."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(run.out / "vae").to(run.device).eval().requires_grad_(False)


@torch.no_grad()
def encode_scenes(run: Run, denoiser: Denoiser) -> tuple[Tensor, Tensor]:
    """Latents (N, C, H, W) float16 and ids (N, 2, L) of the training scenes, kept on the device."""
    vae = load_vae(run)
    scenes = sample_scenes(run.scenes // run.world, TRAIN_SEED + 100 * run.rank)
    ids = denoiser.tokenize([scene.caption for scene in scenes]).to(run.device)
    latents = []
    for first in range(0, len(scenes), run.batch):
        with run.autocast():
            moments = vae.encode(render(scenes[first : first + run.batch], run.sizes.picture, run.device)).latent_dist
        latents.append(((moments.mode().float() - vae.config.shift_factor) * vae.config.scaling_factor).half())
    return torch.cat(latents), ids


def stage_flow(run: Run, seconds: float, denoiser: Denoiser, data: tuple[Tensor, Tensor]) -> None:
    """Flow matching, with some captions left empty so that guidance has something to lead away from."""
    latents, ids = data
    empty = denoiser.tokenize([""]).to(run.device)
    call = run.compiled(denoiser.transformer)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = Ema(denoiser)
    ones = torch.ones(run.batch, device=run.device)
    for step in run.steps(seconds, optimizer, "flow"):
        rows, z, sigma, target = noisy_batch(run, latents)
        dropped = torch.rand(run.batch, 1, 1, device=run.device) < EMPTY_CAPTION_SHARE
        with run.autocast():
            context, pooled = denoiser.encode(torch.where(dropped, empty, ids[rows]))
            predicted = velocity(call, z, sigma, ones, context, pooled)
        loss = F.mse_loss(predicted, target)
        run.update(loss, optimizer)
        ema.update(step)
        run.note("loss", loss)
    ema.store()


def stage_guidance(run: Run, seconds: float, denoiser: Denoiser, data: tuple[Tensor, Tensor]) -> None:
    """Guidance distillation, as FLUX.1-dev had it: one call with guidance g gives v_empty + g (v_caption − v_empty)."""
    latents, ids = data
    empty = denoiser.tokenize([""]).to(run.device)
    teacher = make_transformer(run.sizes).to(run.device)
    teacher.load_state_dict(denoiser.transformer.state_dict())
    teacher.requires_grad_(False)
    student_call, teacher_call = run.compiled(denoiser.transformer), run.compiled(teacher)
    optimizer = torch.optim.AdamW(denoiser.transformer.parameters(), lr=3e-4, betas=(0.9, 0.99), fused=True)
    ema = Ema(denoiser.transformer, 0.998)
    ones = torch.ones(run.batch, device=run.device)
    for step in run.steps(seconds, optimizer, "guidance"):
        rows, z, sigma, _ = noisy_batch(run, latents)
        guidance = 1 + 4 * torch.rand(run.batch, device=run.device)
        with run.autocast():
            with torch.no_grad():
                context, pooled = denoiser.encode(ids[rows])
                no_context, no_pooled = (t.expand(run.batch, *t.shape[1:]).contiguous() for t in denoiser.encode(empty))
                with_caption = velocity(teacher_call, z, sigma, ones, context, pooled)
                without = velocity(teacher_call, z, sigma, ones, no_context, no_pooled)
            predicted = velocity(student_call, z, sigma, guidance, context, pooled)
        target = without + guidance[:, None, None, None] * (with_caption - without)
        loss = F.mse_loss(predicted, target)
        run.update(loss, optimizer)
        ema.update(step)
        run.note("loss", loss)
    ema.store()


def stage_adapter(
    run: Run, seconds: float, denoiser: Denoiser, data: tuple[Tensor, Tensor], patches: tuple[int, ...]
) -> dict[int, Level]:
    """Distil coarse levels from the frozen native one."""
    latents, ids = data
    denoiser.requires_grad_(False)
    config = AdapterConfig(targets=FEED_FORWARD)
    distillation = Distillation(run, denoiser.transformer, patches, config, latents.shape[2:])
    kept = run.out / "adapter.pt"
    if kept.exists():
        distillation.own.load_state_dict(torch.load(kept, map_location=run.device))
        return distillation.levels
    optimizer = torch.optim.AdamW(distillation.groups, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    ema = Ema(distillation.own, 0.998)
    for step in run.steps(seconds, optimizer, "adapter"):
        rows, z, sigma, _ = noisy_batch(run, latents)
        guidance = 1 + 4 * torch.rand(run.batch, device=run.device)
        with run.autocast(), torch.no_grad():
            context, pooled = denoiser.encode(ids[rows])
        distillation.backward(States(z, sigma, guidance, context, pooled))
        run.step(optimizer)
        ema.update(step)
    ema.store()
    if run.rank == 0:
        keep(distillation.own.state_dict(), kept)
    return distillation.levels


# ---- results ----


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
                vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor).sample for z in latent.split(25)
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
    import copy

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


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for results; finished stages are kept."
)
@click.option("--preset", type=click.Choice(["demo", "tiny"]), default="demo", help="tiny: a smoke test on a CPU.")
@click.option("--compile/--no-compile", "compiled", default=torch.cuda.is_available(), help="Use torch.compile.")
@click.option("--batch", default=512, show_default=True)
@click.option("--scenes", default=128_000, show_default=True, help="Training scenes.")
@click.option("--vae-seconds", default=150.0, show_default=True)
@click.option("--flow-seconds", default=620.0, show_default=True)
@click.option("--guidance-seconds", default=110.0, show_default=True)
@click.option("--adapter-seconds", default=260.0, show_default=True)
def main(
    out: Path,
    preset: str,
    compiled: bool,
    batch: int,
    scenes: int,
    vae_seconds: float,
    flow_seconds: float,
    guidance_seconds: float,
    adapter_seconds: float,
) -> None:
    """Train the demo model."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    tiny = preset == "tiny"
    if tiny:
        batch, scenes = 8, 16
    run = Run(
        out=out,
        sizes=TINY if tiny else Sizes(),
        scenes=scenes,
        batch=batch,
        compile=compiled,
        max_steps=2 if tiny else None,
    )
    torch.manual_seed(run.rank)
    out.mkdir(parents=True, exist_ok=True)

    if not (out / "vae").exists():
        stage_vae(run, vae_seconds)
        run.accelerator.wait_for_everyone()
    denoiser = Denoiser(run.sizes).to(run.device)
    run.start_together(denoiser.parameters())
    start = perf_counter()
    data = encode_scenes(run, denoiser)
    run.say(f"latents: {len(data[0])} a process in {perf_counter() - start:.0f} s")
    for name, stage, seconds in (("flow", stage_flow, flow_seconds), ("guidance", stage_guidance, guidance_seconds)):
        kept = out / f"{name}.pt"
        if kept.exists():
            denoiser.load_state_dict(torch.load(kept, map_location=run.device))
        else:
            stage(run, seconds, denoiser, data)
            if run.rank == 0:
                keep(denoiser.state_dict(), kept)
    levels = stage_adapter(run, adapter_seconds, denoiser, data, (4, 8))
    run.accelerator.end_training()
    if run.rank > 0:
        return
    save_model(run, denoiser, levels)
    classifier = SceneClassifier.load().to(run.device)
    best = evaluate(run, denoiser, levels, classifier)
    (out / "model" / "ddit.json").write_text(json.dumps({**EXPORT_DEFAULTS, "guidance": best}, indent=2) + "\n")


if __name__ == "__main__":
    main()
