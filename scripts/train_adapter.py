"""Train the adapter of a FLUX.1 pipeline: coarse levels, distilled from the frozen native one. See docs/train.md.

    python scripts/train_adapter.py --model demo --levels 4,8 --prompts scenes:20000 --minutes 15 --out runs/adapter
    ddit-export flux --model demo --adapter runs/adapter/adapter.safetensors

A run that was interrupted, or that shall go on for longer, goes on from its last checkpoint: give the command again.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import click

from ddit.exporter.cli import Levels
from ddit.exporter.families import FLUX
from ddit.exporter.models import find_model, quiet_libraries
from ddit.profiles import ProfileError, load_profile
from ddit.runtime import shapes
from ddit.runtime.console import DditCommand, set_up_logging
from ddit.runtime.errors import DditError, UsageError
from ddit.runtime.tools.bench import peak_memory_mb

try:
    import torch
    from accelerate import Accelerator
    from diffusers import FluxTransformer2DModel
    from distillation import Distillation
    from encoding import (
        Picture,
        encode_once,
        find_pictures,
        longest_text,
        picture_encoder,
        random_text,
        text_encoder,
    )
    from prompts import read_prompts
    from random_model import random_transformer
    from scenes import sample_scenes
    from states import Draws, Noised, StateSource, Trajectories
    from trainee import Trainee, train
    from training import Ema, Training, whole

    from ddit.exporter.adapter import load_adapter
    from ddit.exporter.components import TORCH_DTYPES, load_component
    from ddit.exporter.families.flux.model import Flux as FluxModel
    from ddit.exporter.families.flux.modules import ATTENTION, FEED_FORWARD, NATIVE_PATCH
    from ddit.exporter.levels import AdapterConfig
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error.name} is not installed: pip install 'ddit[train]'") from None

SETTINGS, ENCODED = "run.json", "encoded"
SCENES_SEED = 1  # the demo model's training scenes; the evaluation takes others
RANDOM_PROMPTS = 16
MAX_STEPS = 10_000
LORA = {"feed-forward": FEED_FORWARD, "all": (*FEED_FORWARD, *ATTENTION)}
RATES = {"adamw": 1e-4, "prodigy": 1.0}


class Span(click.ParamType):  # type: ignore[type-arg]
    """A number, or two with a dash between them: a range."""

    name = "range"

    def __init__(self, number: type[int] | type[float]):
        self._number = number

    def convert(
        self, value: str | tuple[float, float], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float]:
        """``"3.5"`` → ``(3.5, 3.5)``, ``"1-4"`` → ``(1.0, 4.0)``."""
        if isinstance(value, tuple):
            return value
        low, dash, high = value.partition("-")
        try:
            span = self._number(low), self._number(high if dash else low)
        except ValueError:
            span = 1, 0
        if not 1 <= span[0] <= span[1]:
            self.fail(f"{value!r}: give a number of 1 or more, or a range as in 1-4", param, ctx)
        return span


@dataclass(frozen=True)
class Settings:
    """What a folder's checkpoints belong to; a run may go on with anything else changed."""

    model: str
    revision: str | None
    levels: str
    rank: int
    lora: str
    residual_width: int
    identity: bool
    resize: bool
    height: int
    width: int
    text_length: int
    precision: Literal["bf16", "fp32"]
    batch: int
    latents: str
    prompts: str  # a hash
    optimizer: str
    start: str | None  # an adapter's hash
    random_weights: bool

    def claim(self, out: Path) -> None:
        """Take the folder for this run. Raises `UsageError` where it belongs to another."""
        path = out / SETTINGS
        try:
            before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else asdict(self)
        except (OSError, ValueError):
            raise DditError(f"{path} cannot be read; choose another --out") from None
        for name, value in asdict(self).items():
            if before.get(name) != value:
                raise UsageError(f"{out} holds a run with {name} {before.get(name)}, not {value}; choose another --out")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DditError(f"{out} cannot be written: {error.strerror}") from None
        with whole(path) as part:
            part.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default=FLUX.model, show_default=True, help="Hub id, local diffusers folder, or 'demo'.")
@click.option("--revision", help="Branch, tag or commit of the model on the hub.")
@click.option("--levels", type=Levels(), help="Patch sizes to train, as in 4,8.  [default: the model's, or 4]")
@click.option("--prompts", help="A file with a prompt a line, or scenes:N or scenes:START-STOP, the demo's.")
@click.option(
    "--latents",
    default="teacher",
    show_default=True,
    help="teacher: states that the native level's sampler goes through; student: the same with coarse steps among "
    "them; images:FOLDER: pictures with noise, each with a caption beside it (name.png, name.txt).",
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the results.")
@click.option("--height", type=int, help="Pixels.  [default: the profile's optimum]")
@click.option("--width", type=int, help="Pixels.  [default: the profile's optimum]")
@click.option("--text-length", type=click.IntRange(1), help="Tokens of a prompt.  [default: the model's]")
@click.option("--steps", type=Span(int), help="Denoising steps, or a range as in 20-50.  [default: the model's]")
@click.option("--guidance", type=Span(float), help="Guidance scale, or a range as in 1-4.  [default: the model's]")
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True, help="States at once, on one device.")
@click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True, help="Batches of a training step.")
@click.option("--max-steps", type=click.IntRange(1), help=f"Training steps.  [default: {MAX_STEPS}, or no limit]")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Training time, all runs together.")
@click.option("--save-every", type=click.IntRange(1), default=500, show_default=True, help="Training steps.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Learning rate.  [default: 1e-4, prodigy: 1]")
@click.option("--optimizer", type=click.Choice(list(RATES)), default="adamw", show_default=True)
@click.option(
    "--ema", type=click.FloatRange(0, 1, max_open=True), default=0.999, show_default=True, help="Decay of the average."
)
@click.option("--rank", type=click.IntRange(0), default=32, show_default=True, help="Rank of LoRA; 0 leaves it out.")
@click.option(
    "--lora",
    type=click.Choice(list(LORA)),
    default="feed-forward",
    show_default=True,
    help="Layers that get LoRA: feed-forward as in the paper, or these and the attention's.",
)
@click.option(
    "--residual-width",
    type=click.IntRange(0),
    default=AdapterConfig.residual_width,
    show_default=True,
    help="Channels inside the residual path; 0 leaves it out.",
)
@click.option("--identity/--no-identity", default=True, show_default=True, help="Have the identity vector.")
@click.option(
    "--resize/--no-resize", default=True, show_default=True, help="Start patch embedding and head from the native ones."
)
@click.option(
    "--start", type=click.Path(path_type=Path, dir_okay=False), help="Start from this adapter of such levels."
)
@click.option(
    "--precision",
    type=click.Choice(["bf16", "fp32"]),
    default="bf16",
    show_default=True,
    help="Of the frozen model and of products; what is trained is always float32.",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Compute activations twice, to need less memory.")
@click.option("--compile", "compiled", is_flag=True, help="Use torch.compile.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--random-weights", is_flag=True, help="Only try speed and memory: needs the model's configuration alone."
)
def main(
    model: str,
    revision: str | None,
    levels: tuple[int, ...] | None,
    prompts: str | None,
    latents: str,
    out: Path,
    height: int | None,
    width: int | None,
    text_length: int | None,
    steps: tuple[int, int] | None,
    guidance: tuple[float, float] | None,
    batch: int,
    accumulate: int,
    max_steps: int | None,
    minutes: float | None,
    save_every: int,
    lr: float | None,
    optimizer: str,
    ema: float,
    rank: int,
    lora: str,
    residual_width: int,
    identity: bool,
    resize: bool,
    start: Path | None,
    precision: Literal["bf16", "fp32"],
    gradient_checkpointing: bool,
    compiled: bool,
    seed: int,
    random_weights: bool,
) -> None:
    """Train coarse levels to give the native level's velocity: ‖v_coarse − v_native‖²."""
    set_up_logging(0)
    quiet_libraries()
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass crashed (torch 2.11, CUDA 13.0, H200)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    source = find_model(model, revision)
    patches = levels or tuple(patch for patch in source.defaults.levels or (4,) if patch != NATIVE_PATCH)
    if NATIVE_PATCH in patches:
        raise UsageError(f"level {NATIVE_PATCH} is the base model and needs no training; leave it out")
    flux = FluxModel(source, patches, precision)
    if guidance and not flux.guidance.embedded:
        raise UsageError("this model takes no guidance scale (it was not distilled for one); leave it out")
    height, width = picture_size(flux, height, width)
    first = load_adapter(start) if start else None
    captions, pictures = find_captions(prompts, latents, random_weights)
    settings = Settings(
        model=source.info.id,
        revision=source.info.revision,
        levels=",".join(map(str, patches)),
        rank=rank,
        lora=lora,
        residual_width=residual_width,
        identity=identity,
        resize=resize,
        height=height,
        width=width,
        text_length=text_length or longest_text(flux, random_weights),
        precision=precision,
        batch=batch,
        latents=latents,
        prompts=sha256(repr((captions, pictures)).encode()).hexdigest()[:16],
        optimizer=optimizer,
        start=sha256(start.read_bytes()).hexdigest()[:16] if start else None,
        random_weights=random_weights,
    )
    optimizer_class = find_optimizer(optimizer)
    settings.claim(out)

    run = Training(
        batch=batch,
        compile=compiled,
        max_steps=max_steps or (None if minutes else MAX_STEPS),
        accelerator=Accelerator(mixed_precision="bf16" if precision == "bf16" else "no"),
    )
    torch.manual_seed(seed)
    scale = flux.guidance.default
    states = make_states(
        run,
        flux,
        settings,
        out / ENCODED,
        captions,
        pictures,
        steps=steps or (flux.sampler.steps, flux.sampler.steps),
        guidance=guidance or (scale, scale) if flux.guidance.embedded else None,
        draws=Draws(seed + 1000 * run.rank, run.device),
    )
    distillation = Distillation(
        run,
        load_transformer(flux, run.device, random_weights),
        patches,
        AdapterConfig(rank, float(rank), residual_width, identity, targets=LORA[lora]),
        latent_size(flux, height, width),
        checkpointing=gradient_checkpointing,
        resize=resize,
        start=first,
    )
    trainee = Trainee(
        run=run,
        out=out,
        base_model=f"{source.info.id}, random weights" if random_weights else source.info.id,
        distillation=distillation,
        optimizer=optimizer_class(distillation.groups, lr=lr or RATES[optimizer]),
        ema=Ema(distillation.own, ema),
        states=states,
    )
    trainee.restore()
    train(trainee, math.inf if minutes is None else 60 * minutes, accumulate, save_every)
    run.say(f"{trainee.adapter}: after {trainee.progress.step} steps; peak memory {peak_memory(run.device)}")
    run.accelerator.end_training()


def picture_size(flux: FluxModel, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, the profile's where they are not given. Raises `UsageError` if they do not fit."""
    try:
        usual = load_profile(flux.source.defaults.profile or "1024").entry[0]
    except ProfileError as error:
        raise UsageError(str(error)) from None
    height, width = height or usual.height.optimum, width or usual.width.optimum
    shapes.check(flux.latent, flux.levels, {"height": height, "width": width})
    return height, width


def latent_size(flux: FluxModel, height: int, width: int) -> tuple[int, int]:
    """A latent's height and width for a picture's in pixels."""
    symbols = shapes.to_symbols(flux.latent, {"height": height, "width": width})
    return symbols["H"], symbols["W"]


def find_captions(prompts: str | None, latents: str, random_weights: bool) -> tuple[list[str], list[Picture]]:
    """Prompts, and the pictures that they belong to where there are some. Raises `UsageError`."""
    kind, _, folder = latents.partition(":")
    if latents not in ("teacher", "student") and (kind != "images" or not folder):
        raise UsageError(f"unknown latents {latents!r}; write teacher, student or images:FOLDER")
    if prompts and (folder or random_weights):
        reason = "the captions lie beside the pictures" if folder else "random weights know no words"
        raise UsageError(f"{reason}; leave --prompts out")
    if folder:
        pictures = find_pictures(Path(folder))
        return [picture.caption for picture in pictures], pictures
    if random_weights:
        return [f"prompt {number}" for number in range(RANDOM_PROMPTS)], []
    if not prompts:
        raise UsageError("--prompts is missing; give a text file with a prompt a line, or scenes:N")
    asked = read_prompts(prompts)
    if isinstance(asked, range):
        return [scene.caption for scene in sample_scenes(asked.stop, SCENES_SEED)[asked.start :]], []
    return asked, []


def make_states(
    run: Training,
    flux: FluxModel,
    settings: Settings,
    folder: Path,
    captions: list[str],
    pictures: list[Picture],
    **options: Any,
) -> StateSource:
    """What the levels are trained on; encodes prompts and pictures into ``folder`` where that was not done before."""
    info, length, size = flux.source.info, settings.text_length, (settings.height, settings.width)
    if settings.random_weights:
        text = random_text(flux, len(captions), length, run.device)
    else:
        identity = f"{info} {settings.precision} {length}"
        encoder = partial(text_encoder, flux.source, settings.precision, length, run.device)
        text = encode_once(run, folder, "text", identity, captions, encoder)
    latent = (flux.latent.channels, *latent_size(flux, *size))
    options |= {"batch": settings.batch, "latent": latent}
    if not pictures:
        return Trajectories(text, flux.sampler, **options, on_policy=settings.latents == "student")
    encoder = partial(picture_encoder, flux.source, *size, run.device)
    encoded = encode_once(run, folder, "pictures", f"{info} {size}", pictures, encoder)
    return Noised(text, encoded, flux.sampler, **options)


def load_transformer(flux: FluxModel, device: torch.device, random_weights: bool) -> FluxTransformer2DModel:
    """The base model on the device."""
    if not random_weights:
        return load_component(FluxTransformer2DModel, flux.source.folder / "transformer", flux.dtype).to(device)
    return random_transformer(flux.transformer_config, TORCH_DTYPES[flux.dtype], device)


def find_optimizer(name: str) -> Callable[..., torch.optim.Optimizer]:
    """An optimiser's class with its settings. Raises `DditError` where it is not installed."""
    if name == "adamw":
        return partial(torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    try:
        from prodigyopt import Prodigy
    except ModuleNotFoundError:
        raise DditError("prodigyopt is not installed: pip install prodigyopt") from None
    return partial(Prodigy, use_bias_correction=True, safeguard_warmup=True)


def peak_memory(device: torch.device) -> str:
    """The most memory that the process has held, on the GPU if it has one."""
    used = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else peak_memory_mb()
    return f"{used / 1e3:.1f} GB"


if __name__ == "__main__":
    main()
