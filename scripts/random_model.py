"""Write a pipeline of a given architecture with random weights: to measure engines before having the real ones.

    python scripts/random_model.py tests/data/flux1-dev runs/random --double-blocks 1 --single-blocks 2
    ddit-export flux --model runs/random
    python scripts/random_model.py tests/data/wan2.1-t2v-1.3b runs/wan --levels 2,4
    ddit-export wan --model runs/wan

Needs a pipeline's configuration alone. Transformer, VAE and the coarse levels have their real widths, and so their real
cost; the text encoders are small stand-ins, of which only the sizes of what they give are real.
"""

from pathlib import Path
from typing import Any

import click
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from torch import nn

from ddit.exporter.adapter import save_adapter
from ddit.exporter.cli import Levels
from ddit.exporter.components import TORCH_DTYPES
from ddit.exporter.families import FLUX, WAN, family_of
from ddit.exporter.families.base import Family
from ddit.exporter.models import DEFAULTS_FILE, ExportDefaults, find_model, quiet_libraries
from ddit.exporter.schedulers import EULER, UNIPC
from ddit.runtime.bundle.manifest import Dtype
from ddit.runtime.console import DditCommand, say, set_up_logging
from ddit.runtime.errors import ModelError, UsageError
from demo_model.parts import Sizes, make_clip, make_t5, make_umt5
from demo_model.scenes import vocabulary
from training.random_weights import random_level, random_transformer

SCHEDULERS = {EULER: FlowMatchEulerDiscreteScheduler, UNIPC: UniPCMultistepScheduler}
ADAPTER = "adapter.safetensors"


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--blocks",
    "--double-blocks",
    "blocks",
    type=click.IntRange(1),
    help="Blocks of the transformer, of FLUX.1 the double ones.  [default: the model's]",
)
@click.option(
    "--single-blocks", type=click.IntRange(1), help="Single blocks, which FLUX.1 has.  [default: the model's]"
)
@click.option(
    "--levels", type=Levels(), default="2,4,8", show_default=True, help="Levels of the model and its adapter."
)
@click.option("--dtype", type=click.Choice([*TORCH_DTYPES]), default="fp16", show_default=True, help="Of the weights.")
@click.option("--seed", default=0, show_default=True)
def main(
    model: str,
    out: Path,
    blocks: int | None,
    single_blocks: int | None,
    levels: tuple[int, ...],
    dtype: Dtype,
    seed: int,
) -> None:
    """Write the pipeline MODEL (a folder or hub id) with random weights to the folder OUT."""
    set_up_logging(0)
    quiet_libraries()
    if out.exists():
        raise UsageError(f"{out} exists; choose another OUT")
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = find_model(model)
    family = family_of(source)(source, levels, dtype)
    make_pipeline = PIPELINES[family.info.name]
    counts = {"num_layers": blocks, "num_single_layers": single_blocks}
    changes = {name: count for name, count in counts.items() if count}
    if changes.keys() - family.transformer_config.keys():
        raise UsageError(f"{family.info.title} has no single blocks; leave --single-blocks out")
    transformer = random_transformer(family, device, changes)
    say(f"{sum(parameter.numel() for parameter in transformer.parameters()) / 1e9:.2f} billion parameters")
    make_pipeline(family, transformer).save_pretrained(out)
    defaults = ExportDefaults(levels=levels, dtype=dtype)
    if coarse := {patch: random_level(family, transformer, patch) for patch in levels if patch != family.native}:
        save_adapter(
            out / ADAPTER, coarse, base_model=out.resolve().name, family=family.info.name, dtype=TORCH_DTYPES[dtype]
        )
        defaults = defaults.model_copy(update={"adapter": ADAPTER})
    (out / DEFAULTS_FILE).write_text(defaults.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")
    say(f"written to {out}")


def make_scheduler(family: Family) -> Any:
    """The configuration's scheduler. Raises `ModelError` for one that the family does not sample with."""
    config = family.source.config("scheduler", "scheduler_config.json")
    if (kind := SCHEDULERS.get(str(config.get("_class_name")))) is None:
        raise ModelError(f"{config.path} is no {' or '.join(SCHEDULERS)}")
    return kind.from_config(config)


def flux_pipeline(family: Family, transformer: nn.Module) -> FluxPipeline:
    """FLUX.1 around a transformer."""
    config, dtype = family.transformer_config, TORCH_DTYPES[family.dtype]
    clip, tokenizer = make_clip(Sizes(text_width=config["pooled_projection_dim"], text_layers=1))
    t5, tokenizer_2 = make_t5(Sizes(text_width=config["joint_attention_dim"], text_layers=1))
    tokenizer_2.model_max_length = family.longest_text
    return FluxPipeline(
        scheduler=make_scheduler(family),
        vae=AutoencoderKL.from_config(family.source.config("vae")).to(dtype),
        text_encoder=clip.to(dtype),
        tokenizer=tokenizer,
        text_encoder_2=t5.to(dtype),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def wan_pipeline(family: Family, transformer: nn.Module) -> WanPipeline:
    """Wan 2.1 around a transformer."""
    umt5, tokenizer = make_umt5(family.transformer_config["text_dim"], 1, vocabulary(), family.longest_text)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=umt5.to(TORCH_DTYPES[family.dtype]),
        vae=AutoencoderKLWan.from_config(family.source.config("vae")),
        scheduler=make_scheduler(family),
        transformer=transformer,
    )


PIPELINES = {FLUX.name: flux_pipeline, WAN.name: wan_pipeline}


if __name__ == "__main__":
    main()
