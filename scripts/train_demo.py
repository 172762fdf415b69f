"""Train the demo model: VAE, text encoders, transformer, guidance, adapter; about 11 minutes on two GPUs.

    torchrun --nproc-per-node 2 scripts/train_demo.py --out runs/demo --initial exporter/demo      # or, on one GPU:
    python scripts/train_demo.py --out runs/demo --vae-seconds 150 --flow-seconds 600 --adapter-seconds 260
    cp -r runs/demo/model exporter/demo

Work: a step's pictures have one of 15 sizes (`demo_model.buckets`) and, text included, as many tokens as 320 pictures
of 256×256, 87,000 a GPU. 11 M parameters and 272 tokens make about 13 GFLOP for a picture forward and backward, so a
step is 4.2 TFLOP a GPU, whatever the size. One H200 trained 11,000 to 13,500 pictures of 256×256 a second in bfloat16
with torch.compile: 145 to 175 TFLOP/s, a fifth of its peak, which the H100 shares. So 300 seconds would be 10,000 to
12,500 steps, on two GPUs 6 to 8 million pictures' worth of tokens, of 128,000 scenes. Uncompiled, two H100s made 12
steps a second, 2,150 in all (docs/train.md).

--initial continues from a saved model. Without it everything begins at random and needs about twice the time.

Stages run in order and leave their results in --out; a run that was interrupted goes on where it was a minute before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from command_line.options import option, options
from demo_model.buckets import BUCKETS, SHOWN, TINY_BUCKETS
from demo_model.classifier import SceneClassifier
from demo_model.course import Course, PictureRun, load_flags
from demo_model.parts import TINY, Sizes, make_vae
from demo_model.results import evaluate, save_defaults, save_model
from demo_model.stages import (
    Data,
    Denoiser,
    encode_scenes,
    share_tokenizers,
    stage_adapter,
    stage_flow,
    stage_guidance,
    stage_vae,
    start_from,
)

COARSE = (4, 8)  # levels
Stage = Callable[[PictureRun, float, Denoiser, Data], Course]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What was asked for."""

    out: Path = option(
        type=click.Path(path_type=Path), required=True, help="Folder for results; finished stages are kept."
    )
    initial: Path | None = option(
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="A saved model whose weights training begins with.  [default: random ones]",
    )
    preset: str = option(
        type=click.Choice(["demo", "tiny"]), default="demo", show_default=False, help="tiny: a smoke test on a CPU."
    )
    compiled: bool = option(
        "--compile/--no-compile", default=torch.cuda.is_available(), show_default=False, help="Use torch.compile."
    )
    batch: int = option(default=320, help="Pictures of a step and process, counted in tokens of 256×256.")
    scenes: int = option(default=128_000, help="Training scenes.")
    vae_seconds: float = option(default=75.0)
    flow_seconds: float = option(default=300.0)
    guidance_seconds: float = option(default=55.0)
    adapter_seconds: float = option(default=130.0)

    def run(self) -> PictureRun:
        """What all stages need."""
        common: dict[str, Any] = {"out": self.out, "compile": self.compiled, "dynamic": True}
        if self.preset == "tiny":
            return PictureRun(
                **common, sizes=TINY, buckets=TINY_BUCKETS, shown=TINY_BUCKETS[1:], scenes=16, batch=2, max_steps=2
            )
        return PictureRun(**common, sizes=Sizes(), buckets=BUCKETS, shown=SHOWN, scenes=self.scenes, batch=self.batch)


@click.command()
@options(Config)
def main(**given: Any) -> None:
    """Train the demo model."""
    load_flags()
    config = Config(**given)
    run = config.run()
    torch.manual_seed(run.rank)
    run.out.mkdir(parents=True, exist_ok=True)

    denoiser, vae = Denoiser(run.sizes), make_vae(run.sizes)
    if config.initial is not None:
        start_from(config.initial, denoiser, vae)
    share_tokenizers(run, denoiser, config.initial)
    denoiser.to(run.device)
    if not (run.out / "vae").exists():
        stage_vae(run, config.vae_seconds, vae)
        run.accelerator.wait_for_everyone()
    data = encode_scenes(run, denoiser)
    run.say(f"latents: {sum(len(encoded.ids) for encoded in data.values())} a process")
    run.compile_blocks(denoiser.transformer)
    stages: tuple[tuple[str, Stage, float], ...] = (
        ("flow", stage_flow, config.flow_seconds),
        ("guidance", stage_guidance, config.guidance_seconds),
    )
    for name, stage, seconds in stages:
        kept = run.out / f"{name}.pt"
        if kept.exists():
            denoiser.load_state_dict(torch.load(kept, map_location=run.device))
        else:
            stage(run, seconds, denoiser, data).finish(denoiser.state_dict(), kept)
        if run.rank == 0:
            save_model(run, denoiser, {})  # something to look at, should the rest fail
    levels = stage_adapter(run, config.adapter_seconds, denoiser, data, COARSE)
    run.accelerator.end_training()
    if run.rank > 0:
        return
    model = save_model(run, denoiser, levels)
    classifier = SceneClassifier.load().to(run.device)
    save_defaults(model, guidance=evaluate(run, denoiser, levels, classifier))
    run.say(f"{model} is finished")


if __name__ == "__main__":
    main()
