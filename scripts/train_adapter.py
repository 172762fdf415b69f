"""Train the adapter of a pipeline: coarse levels, distilled from the frozen native one. See docs/train.md.

    python scripts/train_adapter.py --model demo --levels 4,8 --prompts scenes:20000 --minutes 15 --out runs/adapter
    ddit-export flux --model demo --adapter runs/adapter/adapter.safetensors

A run that was interrupted, or that shall go on for longer, goes on from its last checkpoint: give the command again.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import click

from command_line.options import options
from ddit.exporter.families.base import Family
from ddit.exporter.models import quiet_libraries
from ddit.runtime.console import DditCommand, set_up_logging
from ddit.runtime.errors import DditError
from ddit.runtime.tools.bench import peak_memory_mb

try:
    import torch
    from accelerate import Accelerator

    from ddit.exporter.components import load_component
    from training.config import Config
    from training.distillation import Distillation, level_tables
    from training.encoding import encode_once, picture_encoder
    from training.loop import Ema, Training, load_flags
    from training.plan import Plan, claim
    from training.random_weights import random_text, random_transformer
    from training.states import Draws, Noised, StateSource, Text, Trajectories
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
    load_flags()
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
        family=plan.family.info.name,
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
    config, family, folder = plan.config, plan.family, plan.config.out / ENCODED
    info, size = family.source.info, (plan.size.height, plan.size.width)
    text, sampling = encode_text(run, plan), plan.sampling
    draws = Draws(config.seed + 1000 * run.rank, run.device)
    if not plan.pictures:
        on_policy = config.latents == "student"
        return Trajectories(text, sampling, batch=config.batch, draws=draws, on_policy=on_policy)
    load_pictures = partial(picture_encoder, family, *size, run.device)
    encoded = encode_once(run, folder, "pictures", f"{info} {size}", plan.pictures, load_pictures)
    return Noised(text, encoded, sampling, batch=config.batch, draws=draws)


def encode_text(run: Training, plan: Plan) -> Text:
    """The prompts, and the negative one where the model is guided by two passes."""
    config, family, folder, length = plan.config, plan.family, plan.config.out / ENCODED, plan.text_length
    if config.random_weights:
        prompts = random_text(family, len(plan.captions), length, run.device)
        return Text(prompts, None if plan.negative is None else random_text(family, 1, length, run.device))
    identity = f"{family.source.info} {config.precision} {length}"
    load = cache(partial(family.text_encoder, length, run.device))
    prompts = encode_once(run, folder, "text", identity, plan.captions, load)
    if plan.negative is None:
        return Text(prompts)
    return Text(prompts, encode_once(run, folder, "text", identity, [plan.negative], load))


def make_distillation(run: Training, plan: Plan) -> Distillation:
    """The levels in training and their teacher, on the device."""
    config, family = plan.config, plan.family
    transformer = load_transformer(family, run.device, config.random_weights)
    parts = config.parts(type(family))
    return Distillation(
        run,
        family.build_level(transformer, family.native),
        {patch: family.build_level(transformer, patch, parts) for patch in family.levels},
        level_tables(family.positions, family.latent, family.native, run.device),
        checkpointing=config.gradient_checkpointing,
        resize=config.resize,
        start=plan.start,
    )


def load_transformer(family: Family, device: torch.device, random_weights: bool) -> torch.nn.Module:
    """The base model on the device."""
    if random_weights:
        return random_transformer(family, device)
    folder = family.source.folder / "transformer"
    transformer: torch.nn.Module = load_component(family.transformer_class, folder, family.dtype)
    return transformer.to(device)


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
