"""The video demo's training, stage by stage: VAE, flow matching, adapter.

Every stage takes a `ClipRun` and a number of seconds, and trains in place.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from ddit.exporter.families.wan.modules import FEED_FORWARD, NATIVE_PATCH, Umt5Encoder, WanLevel
from ddit.exporter.levels import AdapterConfig, Level
from demo_model.course import STARTED, Course, Run, fitting_batch
from demo_model.stages import EMPTY_CAPTION_SHARE, NOISE, TEST_SEED, TRAIN_SEED, random_sigma, restoration_loss
from demo_video.clips import KINDS, balanced_clips, frame_times, render_clips, sample_clips
from demo_video.parts import (
    SHIFT,
    STEPS,
    TEXT_LENGTH,
    TRAIN_STEPS,
    Sizes,
    decode_latents,
    encode_clips,
    latent_scale,
    make_tables,
    make_text_encoder,
    make_transformer,
    sampler_info,
)
from training.distillation import Distillation, Means
from training.encoding import Rows
from training.muon import Muon
from training.states import Draws, Sampling, Text, Trajectories

VAE_FRAMES = 9  # of the windows that the VAE learns from: a first latent frame and two of four frames
DRAWN = 8  # VAE steps whose clips are drawn at once, because drawing is mostly starting small kernels
VAE_RATE, FLOW_RATE = 2e-3, 3e-3  # Muon's learning rates
FEWEST_STEPS = 20  # of a teacher's trajectory
GUIDANCE = (1.0, 5.0)  # scales of a teacher's trajectories


@dataclass(kw_only=True)
class ClipRun(Run):
    """What all stages need."""

    sizes: Sizes
    clips: int  # to train on
    vae_batch: int  # windows of a step of the VAE
    deadline: float = math.inf  # when a stage has to be over, in seconds since the start

    def time_for(self, seconds: float) -> float:
        """Seconds of a stage that begins now and would take so many."""
        return max(1.0, min(seconds, self.deadline - (perf_counter() - STARTED)))


class Denoiser(nn.Module):
    """The transformer and its text encoder, trained together."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.umt5, self.tokenizer = make_text_encoder(sizes)
        self.transformer = make_transformer(sizes)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions → ids (B, TEXT_LENGTH)."""
        options = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True, "return_tensors": "pt"}
        ids: Tensor = self.tokenizer(captions, **options).input_ids
        return ids

    def encode(self, ids: Tensor) -> Tensor:
        """Ids → context (B, L, D), zero where a caption is filled up, as `WanPipeline` makes it."""
        context: Tensor = Umt5Encoder(self.umt5, self.tokenizer.pad_token_id)(ids)
        return context


@dataclass(frozen=True)
class Data:
    """Training clips, encoded: latents (N, C, F, H, W) float16 as the transformer knows them, captions' ids (N, L)."""

    latents: Tensor
    ids: Tensor


def start_from(folder: Path, denoiser: Denoiser, vae: AutoencoderKLWan) -> None:
    """Begin with a saved pipeline's weights instead of random ones, as far as the folder has them."""
    if (folder / "vae").exists():
        vae.load_state_dict(AutoencoderKLWan.from_pretrained(folder / "vae").float().state_dict())
    if (folder / "transformer").exists():
        transformer = WanTransformer3DModel.from_pretrained(folder / "transformer").float()
        denoiser.transformer.load_state_dict(transformer.state_dict())
        denoiser.umt5.load_state_dict(UMT5EncoderModel.from_pretrained(folder / "text_encoder").float().state_dict())


# ---- stages ----


def stage_vae(run: ClipRun, seconds: float, vae: AutoencoderKLWan) -> None:
    """Restore windows of clips, drawn on the fly, from latents that are a little off, as the transformer's will be."""
    frames = min(VAE_FRAMES, run.sizes.frames)
    vae.to(run.device)
    for parameter in vae.parameters():
        if parameter.dim() == 5:  # the layout of the fast kernels
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    pool = sample_clips(32_000 if run.device.type == "cuda" else 256, TRAIN_SEED + 100 * run.rank)
    first = 0

    def draw(count: int) -> Tensor:
        nonlocal first
        clips = [pool[(first + number) % len(pool)] for number in range(count)]
        start = int(torch.randint(run.sizes.frames - frames + 1, ()))
        first += count
        return render_clips(clips, frame_times(frames, run.sizes.frames, start), run.sizes.side, run.device)

    def loss_of(pixels: Tensor) -> Tensor:
        pixels = pixels.contiguous(memory_format=torch.channels_last_3d)
        with run.autocast():
            latent = encode_clips(vae, pixels).float()
            strength = NOISE * latent.std().detach() * torch.rand(len(latent), 1, 1, 1, 1, device=run.device)
            restored = decode_latents(vae, latent + strength * torch.randn_like(latent)).float()
        error = (restored - pixels).transpose(1, 2).flatten(0, 1)
        return restoration_loss(error) + 0.01 * (latent.mean() ** 2 + (latent.var() - 1) ** 2)

    def attempt(batch: int) -> None:
        torch.autograd.backward(loss_of(draw(batch)))
        vae.zero_grad()

    batch = fitting_batch(run, run.vae_batch, attempt)
    ends = (vae.encoder.conv_in, vae.decoder.conv_out)
    course = Course(run, "vae", vae, lr=VAE_RATE, decay=0.998, optimizer=Muon(vae, VAE_RATE, ends=ends))
    drawn: list[Tensor] = []
    for _ in course.steps(run.time_for(seconds)):
        drawn = drawn or list(torch.split(draw(DRAWN * batch), batch))
        loss = loss_of(drawn.pop())
        run.update(loss, course.optimizer)
        run.note("loss", loss)
    finish_vae(run, vae)
    if run.rank == 0:
        vae.save_pretrained(run.out / "vae.part")
        (run.out / "vae.part").rename(run.out / "vae")
        course.checkpoint.unlink(missing_ok=True)


@torch.no_grad()
def finish_vae(run: ClipRun, vae: AutoencoderKLWan) -> None:
    """Fill in what follows from the trained weights, and say how well unseen clips are restored."""
    clips = balanced_clips(128 if run.device.type == "cuda" else 4, TEST_SEED)
    pixels = render_clips(clips, frame_times(run.sizes.frames), run.sizes.side, run.device)
    with run.autocast():
        latent = torch.cat([encode_clips(vae, part) for part in torch.split(pixels, 16)]).float()
        restored = torch.cat([decode_latents(vae, part) for part in torch.split(latent, 16)]).float()
    mean, deviation = latent.mean((0, 2, 3, 4)), latent.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())
    # the posterior's deviation is not trained, but that of the noise which the decoder knows
    out, channels = vae.quant_conv, run.sizes.latent_channels
    out.weight[channels:] = 0
    out.bias[channels:] = 2 * math.log(NOISE / 2 * latent.std().item())
    for kind in KINDS:
        rows = [row for row, clip in enumerate(clips) if clip.kind == kind]
        error = (restored[rows].clamp(-1, 1) - pixels[rows]).square().mean((1, 3, 4))  # of every frame
        decibels = (10 * torch.log10(4 / error)).mean().item()
        run.say(f"vae: {kind} clips {decibels:.1f} dB")


def load_vae(run: ClipRun) -> AutoencoderKLWan:
    """The trained VAE, frozen."""
    return AutoencoderKLWan.from_pretrained(run.out / "vae").to(run.device).eval().requires_grad_(False)


@torch.no_grad()
def encode_data(run: ClipRun, seconds: float, denoiser: Denoiser) -> Data:
    """This process's share of the training clips, or as many as there is time for."""
    started, vae = perf_counter(), load_vae(run)
    mean, deviation = latent_scale(vae, run.device)
    clips = sample_clips(run.clips // run.world, TRAIN_SEED + 100 * run.rank)
    times = frame_times(run.sizes.frames)

    def encode(start: int, count: int) -> Tensor:
        pixels = render_clips(clips[start : start + count], times, run.sizes.side, run.device)
        with run.autocast():
            latent = encode_clips(vae, pixels.contiguous(memory_format=torch.channels_last_3d)).float()
        return ((latent - mean) / deviation).half()

    rows = fitting_batch(run, min(256, len(clips)), lambda count: encode(0, count))
    parts: list[Tensor] = []
    while len(parts) * rows < len(clips) and (not parts or perf_counter() - started < seconds):
        parts.append(encode(len(parts) * rows, rows))
        parts[-1].sum().item()  # waits for the device, so that the time is right
    latents = torch.cat(parts)
    return Data(latents, denoiser.tokenize([clip.caption for clip in clips[: len(latents)]]).to(run.device))


def stage_flow(run: ClipRun, seconds: float, denoiser: Denoiser, data: Data) -> Course:
    """Flow matching, with some captions left empty so that guidance has something to lead away from."""
    empty = denoiser.tokenize([""]).to(run.device)

    def loss_of(batch: int) -> Tensor:
        rows = torch.randint(len(data.latents), (batch,), device=run.device)
        x = data.latents[rows].float()
        noise, sigma = torch.randn_like(x), random_sigma(batch, SHIFT, run.device)
        z = x.lerp(noise, sigma[:, None, None, None, None])
        dropped = torch.rand(batch, 1, device=run.device) < EMPTY_CAPTION_SHARE
        with run.autocast():
            context = denoiser.encode(torch.where(dropped, empty, data.ids[rows]))
            predicted = denoiser.transformer(z, TRAIN_STEPS * sigma, context, return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise - x)

    def attempt(batch: int) -> None:
        torch.autograd.backward(loss_of(batch))
        denoiser.zero_grad()

    batch = fitting_batch(run, run.batch, attempt)
    ends = (denoiser.transformer.patch_embedding, denoiser.transformer.proj_out, denoiser.umt5.shared)
    optimizer = Muon(denoiser, FLOW_RATE, ends=ends, weight_decay=0.01)
    course = Course(run, "flow", denoiser, lr=FLOW_RATE, decay=0.999, optimizer=optimizer)
    for _ in course.steps(run.time_for(seconds)):
        loss = loss_of(batch)
        run.update(loss, course.optimizer)
        run.note("loss", loss)
    return course


def stage_adapter(
    run: ClipRun, seconds: float, denoiser: Denoiser, data: Data, patches: tuple[int, ...]
) -> dict[int, Level]:
    """Distil coarse levels from the frozen native one, on states that its own sampler comes through."""
    denoiser.requires_grad_(False)
    transformer, config = denoiser.transformer, AdapterConfig(targets=FEED_FORWARD)
    levels: dict[int, Level] = {patch: WanLevel(transformer, patch, config) for patch in patches}
    # a plain background has hardly any error but these, and a run adds them up
    means = Means(patch=4.0, picture=40.0)
    teacher, tables = WanLevel(transformer, NATIVE_PATCH), make_tables(run.sizes, run.device)
    distillation = Distillation(run, teacher, levels, tables, means=means)
    kept = run.out / "adapter.pt"
    if kept.exists():
        distillation.own.load_state_dict(torch.load(kept, map_location=run.device))
        return levels

    def attempt(batch: int) -> None:
        distillation.backward(teacher_states(run, denoiser, data, batch).draw())
        distillation.own.zero_grad()

    batch = fitting_batch(run, max(1, run.batch // 2), attempt)
    states = teacher_states(run, denoiser, data, batch)
    course = Course(run, "adapter", distillation.own, lr=1e-3, decay=0.998, groups=distillation.groups)
    for _ in course.steps(run.time_for(seconds)):
        states.advance(distillation.backward(states.draw()))
        run.step(course.optimizer)
    course.finish(distillation.own.state_dict(), kept)
    return levels


@torch.no_grad()
def teacher_states(run: ClipRun, denoiser: Denoiser, data: Data, batch: int) -> Trajectories:
    """Trajectories of the native level, from training clips with noise on."""
    with run.autocast():
        parts = [{"context": denoiser.encode(ids).float()} for ids in torch.split(data.ids, 4096)]
        negative = denoiser.encode(denoiser.tokenize([""]).to(run.device)).float()
    sampling = Sampling(
        sampler=sampler_info(),
        tokens=run.sizes.tokens,
        latent=run.sizes.latent,
        steps=(FEWEST_STEPS, STEPS),
        guidance=GUIDANCE,
    )
    return Trajectories(
        Text(Rows(parts, run.device), Rows([{"context": negative}], run.device)),
        sampling,
        batch=batch,
        draws=Draws(1000 * run.rank, run.device),
        pictures=data.latents,
    )
