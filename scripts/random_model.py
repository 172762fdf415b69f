"""Write a FLUX pipeline of a given architecture with random weights: to measure engines before having the real ones.

    python scripts/random_model.py tests/data/flux1-dev runs/random --double-blocks 1 --single-blocks 2
    ddit-export flux --model runs/random

Needs a pipeline's configuration alone. Transformer, VAE and the coarse levels have their real widths, and so their real
cost; the text encoders are small stand-ins, of which only the sizes of what they give are real.
"""

from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

from ddit.exporter.adapter import save_adapter
from ddit.exporter.cli import Levels
from ddit.exporter.components import TORCH_DTYPES
from ddit.exporter.families.flux.model import Flux
from ddit.exporter.models import DEFAULTS_FILE, ExportDefaults, find_model, quiet_libraries
from ddit.runtime.bundle.manifest import Dtype
from ddit.runtime.console import DditCommand, say, set_up_logging
from ddit.runtime.errors import UsageError
from demo_model.parts import Sizes, make_clip, make_t5
from training.random_weights import random_level, random_transformer

T5_LENGTH = 512  # text tokens of FLUX.1-dev
ADAPTER = "adapter.safetensors"


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--double-blocks", type=click.IntRange(1), help="Double blocks.  [default: the model's]")
@click.option("--single-blocks", type=click.IntRange(1), help="Single blocks.  [default: the model's]")
@click.option(
    "--levels", type=Levels(), default="2,4,8", show_default=True, help="Levels of the model and its adapter."
)
@click.option("--dtype", type=click.Choice([*TORCH_DTYPES]), default="fp16", show_default=True, help="Of the weights.")
@click.option("--seed", default=0, show_default=True)
def main(
    model: str,
    out: Path,
    double_blocks: int | None,
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
    flux = Flux(find_model(model), levels, dtype)
    blocks = {"num_layers": double_blocks, "num_single_layers": single_blocks}
    config = flux.transformer_config | {name: count for name, count in blocks.items() if count}
    transformer = random_transformer(config, TORCH_DTYPES[dtype], device)
    say(f"{sum(parameter.numel() for parameter in transformer.parameters()) / 1e9:.2f} billion parameters")
    clip, tokenizer = make_clip(Sizes(text_width=config["pooled_projection_dim"], text_layers=1))
    t5, tokenizer_2 = make_t5(Sizes(text_width=config["joint_attention_dim"], text_layers=1))
    tokenizer_2.model_max_length = T5_LENGTH
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(flux.source.config("scheduler", "scheduler_config.json")),
        vae=AutoencoderKL.from_config(flux.vae_config).to(TORCH_DTYPES[dtype]),
        text_encoder=clip.to(TORCH_DTYPES[dtype]),
        tokenizer=tokenizer,
        text_encoder_2=t5.to(TORCH_DTYPES[dtype]),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
    pipeline.save_pretrained(out)
    defaults = ExportDefaults(levels=levels, dtype=dtype)
    if coarse := {patch: random_level(transformer, patch) for patch in levels if patch != flux.native}:
        save_adapter(
            out / ADAPTER, coarse, base_model=out.resolve().name, family=flux.info.name, dtype=TORCH_DTYPES[dtype]
        )
        defaults = defaults.model_copy(update={"adapter": ADAPTER})
    (out / DEFAULTS_FILE).write_text(defaults.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")
    say(f"written to {out}")


if __name__ == "__main__":
    main()
