"""The demo model's training, stage by stage: VAE, flow matching, guidance, adapter.

Every stage takes a `Run` and a number of seconds, and trains in place.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor, nn

from ddit.exporter.families.flux.modules import FEED_FORWARD
from ddit.exporter.levels import AdapterConfig, Level
from demo_model.parts import PATCH, TEXT_LENGTH, Sizes, make_clip, make_t5, make_transformer, make_vae
from demo_model.scenes import render, sample_scenes
from training.distillation import Distillation, States
from training.loop import Ema, Training, keep

SHIFT = 1.6487  # e^0.5: what FLUX's scheduler does to the noise levels at 256 image tokens
EMPTY_CAPTION_SHARE = 0.1
TRAIN_SEED, TEST_SEED = 1, 2


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
    unpacked: Tensor = FluxPipeline._unpack_latents(out.float(), height * 8, width * 8, 8)
    return unpacked


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
        latent = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in torch.split(pictures, 32)]).float()
        restored = torch.cat([vae.decode(chunk).sample for chunk in torch.split(latent, 32)]).float()
    vae.register_to_config(scaling_factor=1 / latent.std().item(), shift_factor=latent.mean().item())
    for kind in sorted({scene.background for scene in scenes}):
        rows = [i for i, scene in enumerate(scenes) if scene.background == kind]
        mse = (restored[rows].clamp(-1, 1) - pictures[rows]).square().mean()
        run.say(f"vae: {kind} scenes {10 * torch.log10(4 / mse).item():.1f} dB")
    if run.rank == 0:
        vae.save_pretrained(run.out / "vae.part")
        (run.out / "vae.part").rename(run.out / "vae")


def load_vae(run: Run) -> AutoencoderKL:
    """The trained VAE, frozen."""
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
