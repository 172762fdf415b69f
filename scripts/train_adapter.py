"""Train the adapter of a FLUX.1 pipeline: coarse levels, distilled from the frozen native one. See docs/train.md.

    python scripts/train_adapter.py --model demo --levels 4,8 --prompts scenes:20000 --minutes 15 --out runs/adapter
    ddit-export flux --model demo --adapter runs/adapter/adapter.safetensors

A run that was interrupted, or that shall go on for longer, goes on from its last checkpoint: give the command again.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from command_line.options import options
from ddit.exporter.models import quiet_libraries
from ddit.runtime.console import DditCommand, set_up_logging
from ddit.runtime.errors import DditError
from ddit.runtime.tools.bench import peak_memory_mb

try:
    import torch
    from accelerate import Accelerator
    from diffusers import FluxTransformer2DModel

    from ddit.exporter.components import TORCH_DTYPES, load_component
    from ddit.exporter.families.flux.model import Flux
    from training.config import Config
    from training.distillation import Distillation
    from training.encoding import encode_once, picture_encoder, text_encoder
    from training.loop import Ema, Training
    from training.plan import Plan, claim
    from training.random_weights import random_text, random_transformer
    from training.states import Draws, Noised, StateSource, Trajectories
    from training.trainee import Trainee, train
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error.name} is not installed: pip install 'ddit[train]'") from None

ENCODED = "encoded"


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@options(Config)
def main(**given: Any) -> None:
    """Train coarse levels to give the native level's velocity: ‖v_coarse − v_native‖²."""
    set_up_logging(0)
    quiet_libraries()
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass crashed (torch 2.11, CUDA 13.0, H200)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    config = Config(**given)
    plan = Plan.make(config)
    optimizer_class = find_optimizer(config.optimizer)
    claim(config.out, plan.settings())
    run = Training(
        batch=config.batch,
        compile=config.compiled,
        max_steps=plan.max_steps,
        accelerator=Accelerator(mixed_precision="bf16" if config.precision == "bf16" else "no"),
    )
    torch.manual_seed(config.seed)
    states = make_states(run, plan)
    distillation = make_distillation(run, plan)
    trainee = Trainee(
        run=run,
        out=config.out,
        base_model=plan.base_model,
        distillation=distillation,
        optimizer=optimizer_class(distillation.groups, lr=plan.lr),
        ema=Ema(distillation.own, config.ema),
        states=states,
    )
    trainee.restore()
    train(trainee, math.inf if config.minutes is None else 60 * config.minutes, config.accumulate, config.save_every)
    run.say(f"{trainee.adapter}: after {trainee.progress.step} steps; peak memory {peak_memory(run.device)}")
    run.accelerator.end_training()


def make_states(run: Training, plan: Plan) -> StateSource:
    """What the levels are trained on; encodes prompts and pictures where that was not done before."""
    config, flux, folder = plan.config, plan.flux, plan.config.out / ENCODED
    info, size = flux.source.info, (plan.height, plan.width)
    if config.random_weights:
        text = random_text(flux, len(plan.captions), plan.text_length, run.device)
    else:
        identity = f"{info} {config.precision} {plan.text_length}"
        load_text = partial(text_encoder, flux.source, config.precision, plan.text_length, run.device)
        text = encode_once(run, folder, "text", identity, plan.captions, load_text)
    common: dict[str, Any] = {
        "batch": config.batch,
        "latent": plan.latent,
        "steps": plan.steps,
        "guidance": plan.guidance,
        "draws": Draws(config.seed + 1000 * run.rank, run.device),
    }
    if not plan.pictures:
        return Trajectories(text, flux.sampler, **common, on_policy=config.latents == "student")
    load_pictures = partial(picture_encoder, flux.source, *size, run.device)
    encoded = encode_once(run, folder, "pictures", f"{info} {size}", plan.pictures, load_pictures)
    return Noised(text, encoded, flux.sampler, **common)


def make_distillation(run: Training, plan: Plan) -> Distillation:
    """The levels in training and their teacher, on the device."""
    config = plan.config
    return Distillation(
        run,
        load_transformer(plan.flux, run.device, config.random_weights),
        plan.flux.levels,
        config.parts,
        checkpointing=config.gradient_checkpointing,
        resize=config.resize,
        start=plan.start,
    )


def load_transformer(flux: Flux, device: torch.device, random_weights: bool) -> FluxTransformer2DModel:
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
