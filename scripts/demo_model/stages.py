"""The demo model's training, stage by stage: VAE, flow matching, guidance, adapter.

Every stage takes a `Run` and a number of seconds, and trains in place. A step has pictures of one size, and as many of
them as make the same work at every size.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from ddit.exporter.families.flux.modules import FEED_FORWARD, FluxLevel
from ddit.exporter.levels import AdapterConfig, Level
from ddit.runtime.bundle.manifest import FlowMatchEulerInfo
from demo_model.buckets import Bucket, bucket_of
from demo_model.course import Course, PictureRun
from demo_model.parts import (
    PATCH,
    STEPS,
    TEXT_LENGTH,
    Sizes,
    make_clip,
    make_scheduler,
    make_t5,
    make_tables,
    make_transformer,
)
from demo_model.scenes import render, sample_scenes
from training.distillation import Distillation, Means
from training.encoding import Rows
from training.states import Draws, Sampling, Text, Trajectories

EMPTY_CAPTION_SHARE = 0.1
TRAIN_SEED, TEST_SEED = 1, 2
MOST_GUIDANCE = 5.0
VAE_SHARE = 20  # a step of the VAE has this many times fewer pictures: many small ones restore better than few large
DRAWN = 8  # VAE steps whose pictures are drawn at once, because drawing is mostly starting small kernels
NOISE = 0.25  # the most that latents are disturbed by before they are decoded, in units of their deviation
HUE_CELL = 16  # pixels
FEWEST_STEPS = 20  # of a teacher's trajectory


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


def share_tokenizers(run: PictureRun, denoiser: Denoiser, start: Path | None = None) -> None:
    """Give all processes, and every later run, the tokenizers of the first one, or of a saved pipeline.

    Training a tokenizer twice gives the tokens other numbers: equal counts come in no fixed order.
    """
    folder, names = run.out / "tokenizers", ("tokenizer", "tokenizer_2")
    if run.rank == 0 and not folder.exists():
        part = run.out / "tokenizers.part"
        for name, made in zip(names, (denoiser.clip_tokenizer, denoiser.t5_tokenizer), strict=True):
            (PreTrainedTokenizerFast.from_pretrained(start / name) if start else made).save_pretrained(part / name)
        part.rename(folder)
    run.accelerator.wait_for_everyone()
    denoiser.clip_tokenizer, denoiser.t5_tokenizer = (
        PreTrainedTokenizerFast.from_pretrained(folder / name) for name in names
    )


def start_from(folder: Path, denoiser: Denoiser, vae: AutoencoderKL) -> None:
    """Begin with the weights of a saved pipeline instead of random ones; its tokenizers belong to them."""
    parts: dict[str, tuple[Any, nn.Module]] = {
        "vae": (AutoencoderKL, vae),
        "transformer": (FluxTransformer2DModel, denoiser.transformer),
        "text_encoder": (CLIPTextModel, denoiser.clip),
        "text_encoder_2": (T5EncoderModel, denoiser.t5),
    }
    for name, (kind, part) in parts.items():
        part.load_state_dict(kind.from_pretrained(folder / name, torch_dtype=torch.float32).state_dict())


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


@dataclass(frozen=True)
class Encoded:
    """Training pictures of one size: latents (N, C, H, W) float16 and their captions' ids (N, 2, L), on the device."""

    latents: Tensor
    ids: Tensor


Data = Mapping[Bucket, Encoded]


def random_sigma(count: int, shift: float, device: torch.device) -> Tensor:
    """Noise levels: logit-normal (SD3, arXiv 2403.03206) with a uniform fifth, shifted as in sampling."""
    sigma = torch.sigmoid(torch.randn(count, device=device))
    sigma = torch.where(torch.rand(count, device=device) < 0.2, torch.rand(count, device=device), sigma)
    return shift * sigma / (1 + (shift - 1) * sigma)


def noisy_batch(run: PictureRun, bucket: Bucket, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A random batch: rows of the data, z = (1 − σ) x + σ noise, σ, and the velocity noise − x that leads there."""
    count = bucket.rows(run.batch)
    rows = torch.randint(len(latents), (count,), device=run.device)
    x = latents[rows].float()
    noise, sigma = torch.randn_like(x), random_sigma(count, bucket.shift, run.device)
    return rows, x.lerp(noise, sigma[:, None, None, None]), sigma, noise - x


# ---- stages ----


def stage_vae(run: PictureRun, seconds: float, vae: AutoencoderKL) -> None:
    """Restore scenes, drawn on the fly, from latents that are a little off, as the transformer's will be."""
    vae.to(run.device, memory_format=torch.channels_last)
    course = Course(run, "vae", vae, lr=1e-3, decay=0.998, weight_decay=1e-4, fused=False)
    pool = sample_scenes(32_000 if run.device.type == "cuda" else 64, TRAIN_SEED + 100 * run.rank)
    drawn: list[Tensor] = []
    first = 0
    for step in course.steps(seconds):
        if not drawn:
            bucket = bucket_of(step, run.buckets)
            rows = bucket.rows(run.batch // VAE_SHARE)
            scenes = [pool[(first + i) % len(pool)] for i in range(DRAWN * rows)]
            first += len(scenes)
            drawn = list(torch.split(render(scenes, bucket.size, run.device), rows))
        pictures = drawn.pop().contiguous(memory_format=torch.channels_last)
        with run.autocast():
            latent = vae.encode(pictures).latent_dist.mode().float()
            strength = NOISE * latent.std().detach() * torch.rand(len(latent), 1, 1, 1, device=run.device)
            restored = vae.decode(latent + strength * torch.randn_like(latent)).sample.float()
        loss = restoration_loss(restored - pictures) + 0.01 * (latent.mean() ** 2 + (latent.var() - 1) ** 2)
        run.update(loss, course.optimizer)
        run.note("loss", loss)
    finish_vae(run, vae)
    if run.rank == 0:
        vae.save_pretrained(run.out / "vae.part")
        (run.out / "vae.part").rename(run.out / "vae")
        course.checkpoint.unlink(missing_ok=True)


def restoration_loss(error: Tensor) -> Tensor:
    """What errors (B, 3, H, W) of restored pictures cost: in colour, at edges, and in the mean of a cell.

    The last one is what an even background with the wrong hue has nothing else than.
    """
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges + 0.5 * F.avg_pool2d(error, HUE_CELL).abs().mean()


@torch.no_grad()
def finish_vae(run: PictureRun, vae: AutoencoderKL) -> None:
    """Fill in what follows from the trained weights, and say how well unseen scenes are restored."""
    scenes = sample_scenes(256 if run.device.type == "cuda" else 8, TEST_SEED)
    with run.autocast():
        pictures = render(scenes, run.sizes.picture, run.device)
        latent = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in torch.split(pictures, 32)]).float()
        restored = torch.cat([vae.decode(chunk).sample for chunk in torch.split(latent, 32)]).float()
    deviation = latent.std().item()
    vae.register_to_config(scaling_factor=1 / deviation, shift_factor=latent.mean().item())
    # the posterior's deviation is not trained, but that of the noise which the decoder knows
    out = vae.encoder.conv_out
    out.weight[run.sizes.latent_channels :] = 0
    out.bias[run.sizes.latent_channels :] = 2 * math.log(NOISE / 2 * deviation)
    for kind in sorted({scene.background for scene in scenes}):
        rows = [i for i, scene in enumerate(scenes) if scene.background == kind]
        error = restored[rows].clamp(-1, 1) - pictures[rows]
        hue = F.avg_pool2d(error, HUE_CELL).abs().mean().item()
        mse = error.square().mean()
        run.say(f"vae: {kind} scenes {10 * torch.log10(4 / mse).item():.1f} dB, colours off by {hue / 2:.2%}")


def load_vae(run: PictureRun) -> AutoencoderKL:
    """The trained VAE, frozen."""
    return AutoencoderKL.from_pretrained(run.out / "vae").to(run.device).eval().requires_grad_(False)


@torch.no_grad()
def encode_scenes(run: PictureRun, denoiser: Denoiser) -> Data:
    """The training scenes, each at one size; a size has as many as it has pictures in training."""
    vae = load_vae(run)
    scenes = sample_scenes(run.scenes // run.world, TRAIN_SEED + 100 * run.rank)
    shares = [bucket.weight * bucket.rows(run.batch) for bucket in run.buckets]
    data, first = {}, 0
    for number, bucket in enumerate(run.buckets):
        stop = round(len(scenes) * sum(shares[: number + 1]) / sum(shares))
        chosen, rows, latents = scenes[first:stop], bucket.rows(run.batch), []
        for start in range(0, len(chosen), rows):
            pictures = render(chosen[start : start + rows], bucket.size, run.device)
            with run.autocast():
                latent = vae.encode(pictures).latent_dist.mode().float()
            latents.append(((latent - vae.config.shift_factor) * vae.config.scaling_factor).half())
        ids = denoiser.tokenize([scene.caption for scene in chosen]).to(run.device)
        data[bucket], first = Encoded(torch.cat(latents), ids), stop
    return data


def stage_flow(run: PictureRun, seconds: float, denoiser: Denoiser, data: Data) -> Course:
    """Flow matching, with some captions left empty so that guidance has something to lead away from."""
    empty = denoiser.tokenize([""]).to(run.device)
    course = Course(run, "flow", denoiser, lr=1e-3, decay=0.9995, weight_decay=0.01)
    for step in course.steps(seconds):
        bucket = bucket_of(step, run.buckets)
        rows, z, sigma, target = noisy_batch(run, bucket, data[bucket].latents)
        dropped = torch.rand(len(rows), 1, 1, device=run.device) < EMPTY_CAPTION_SHARE
        with run.autocast():
            context, pooled = denoiser.encode(torch.where(dropped, empty, data[bucket].ids[rows]))
            predicted = velocity(denoiser.transformer, z, sigma, torch.ones_like(sigma), context, pooled)
        loss = F.mse_loss(predicted, target)
        run.update(loss, course.optimizer)
        run.note("loss", loss)
    return course


def stage_guidance(run: PictureRun, seconds: float, denoiser: Denoiser, data: Data) -> Course:
    """Guidance distillation, as FLUX.1-dev had it: one call with guidance g gives v_empty + g (v_caption − v_empty)."""
    empty = denoiser.tokenize([""]).to(run.device)
    teacher = make_transformer(run.sizes).to(run.device)
    teacher.load_state_dict(denoiser.transformer.state_dict())
    teacher.requires_grad_(False)
    run.compile_blocks(teacher)
    course = Course(run, "guidance", denoiser.transformer, lr=3e-4, decay=0.998)
    for step in course.steps(seconds):
        bucket = bucket_of(step, run.buckets)
        rows, z, sigma, _ = noisy_batch(run, bucket, data[bucket].latents)
        guidance = random_guidance(len(rows), run.device)
        with run.autocast():
            with torch.no_grad():
                context, pooled = denoiser.encode(data[bucket].ids[rows])
                no_context, no_pooled = (t.expand(len(rows), *t.shape[1:]).contiguous() for t in denoiser.encode(empty))
                ones = torch.ones_like(sigma)
                with_caption = velocity(teacher, z, sigma, ones, context, pooled)
                without = velocity(teacher, z, sigma, ones, no_context, no_pooled)
            predicted = velocity(denoiser.transformer, z, sigma, guidance, context, pooled)
        target = without + guidance[:, None, None, None] * (with_caption - without)
        loss = F.mse_loss(predicted, target)
        run.update(loss, course.optimizer)
        run.note("loss", loss)
    return course


def random_guidance(count: int, device: torch.device) -> Tensor:
    """Guidance scales between 1 and the largest that the model knows."""
    return 1 + (MOST_GUIDANCE - 1) * torch.rand(count, device=device)


def stage_adapter(
    run: PictureRun, seconds: float, denoiser: Denoiser, data: Data, patches: tuple[int, ...]
) -> dict[int, Level]:
    """Distil coarse levels from the frozen native one, on states that its own sampler comes through."""
    denoiser.requires_grad_(False)
    # a plain background has hardly any error but these, and a long run of level 8 adds them up
    means = Means(patch=4.0, picture=40.0)
    transformer, config = denoiser.transformer, AdapterConfig(targets=FEED_FORWARD)
    levels: dict[int, Level] = {patch: FluxLevel(transformer, patch, config) for patch in patches}
    tables = make_tables(transformer, run.device)
    distillation = Distillation(run, FluxLevel(transformer, PATCH), levels, tables, means=means)
    kept = run.out / "adapter.pt"
    if kept.exists():
        distillation.own.load_state_dict(torch.load(kept, map_location=run.device))
        return levels
    course = Course(run, "adapter", distillation.own, lr=1e-3, decay=0.998, groups=distillation.groups)
    states = {bucket: teacher_states(run, denoiser, bucket, data[bucket]) for bucket in run.buckets}
    for step in course.steps(seconds):
        source = states[bucket_of(step, run.buckets)]
        source.advance(distillation.backward(source.draw()))
        run.step(course.optimizer)
    course.finish(distillation.own.state_dict(), kept)
    return levels


def teacher_states(run: PictureRun, denoiser: Denoiser, bucket: Bucket, encoded: Encoded) -> Trajectories:
    """Trajectories of the native level at one size, from training pictures with noise on."""
    parts = []
    with run.autocast(), torch.no_grad():
        for ids in torch.split(encoded.ids, 4096):
            context, pooled = denoiser.encode(ids)
            parts.append({"context": context.float(), "pooled": pooled.float()})
    count = bucket.rows(run.batch)
    rows = Rows([{name: torch.cat([part[name] for part in parts]) for name in ("context", "pooled")}], run.device)
    sampling = Sampling(
        sampler=sampler_info(),
        tokens=bucket.tokens,
        latent=(run.sizes.latent_channels, *bucket.latent),
        steps=(FEWEST_STEPS, STEPS),
        guidance=(1.0, MOST_GUIDANCE),
    )
    return Trajectories(
        Text(rows),
        sampling,
        batch=count,
        draws=Draws(1000 * run.rank + bucket.tokens, run.device),
        pictures=encoded.latents,
    )


def sampler_info() -> FlowMatchEulerInfo:
    """The saved pipeline's scheduler, as a bundle describes it."""
    config = make_scheduler().config
    return FlowMatchEulerInfo(**{n: config[n] for n in FlowMatchEulerInfo.model_fields if n in config}, steps=STEPS)
