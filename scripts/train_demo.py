"""Train the demo model from scratch: VAE, text encoders, transformer, guidance, adapter; about 20 minutes on one GPU.

    python scripts/train_demo.py --out runs/demo                           # or, on two GPUs, half the time:
    torchrun --nproc-per-node 2 scripts/train_demo.py --out runs/demo --vae-seconds 75 --flow-seconds 310 …
    cp -r runs/demo/model exporter/demo

Work: 11 M parameters and 272 tokens make about 13 GFLOP for a sample forward and backward. One H200 trains 11,000 to
13,500 samples a second in bfloat16 with torch.compile, so 10 minutes see 7 million samples of 128,000 scenes.

Stages run in order and leave their results in --out; a run that was interrupted goes on with the first unfinished one.
cuDNN's attention is switched off: its backward pass crashed for these shapes (torch 2.11, CUDA 13.0, H200).
"""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import torch

from command_line.options import option, options
from demo_model.classifier import SceneClassifier
from demo_model.parts import TINY, Sizes
from demo_model.results import evaluate, save_defaults, save_model
from demo_model.stages import (
    Denoiser,
    Run,
    encode_scenes,
    stage_adapter,
    stage_flow,
    stage_guidance,
    stage_vae,
)
from training.loop import keep

COARSE = (4, 8)  # levels


@dataclass(frozen=True, kw_only=True)
class Config:
    """What was asked for."""

    out: Path = option(
        type=click.Path(path_type=Path), required=True, help="Folder for results; finished stages are kept."
    )
    preset: str = option(
        type=click.Choice(["demo", "tiny"]), default="demo", show_default=False, help="tiny: a smoke test on a CPU."
    )
    compiled: bool = option(
        "--compile/--no-compile", default=torch.cuda.is_available(), show_default=False, help="Use torch.compile."
    )
    batch: int = option(default=512)
    scenes: int = option(default=128_000, help="Training scenes.")
    vae_seconds: float = option(default=150.0)
    flow_seconds: float = option(default=620.0)
    guidance_seconds: float = option(default=110.0)
    adapter_seconds: float = option(default=260.0)

    def run(self) -> Run:
        """What all stages need."""
        if self.preset == "tiny":
            return Run(out=self.out, sizes=TINY, scenes=16, batch=8, compile=self.compiled, max_steps=2)
        return Run(out=self.out, sizes=Sizes(), scenes=self.scenes, batch=self.batch, compile=self.compiled)


@click.command()
@options(Config)
def main(**given: Any) -> None:
    """Train the demo model."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    config = Config(**given)
    run = config.run()
    torch.manual_seed(run.rank)
    run.out.mkdir(parents=True, exist_ok=True)

    if not (run.out / "vae").exists():
        stage_vae(run, config.vae_seconds)
        run.accelerator.wait_for_everyone()
    denoiser = Denoiser(run.sizes).to(run.device)
    run.start_together(denoiser.parameters())
    start = perf_counter()
    data = encode_scenes(run, denoiser)
    run.say(f"latents: {len(data[0])} a process in {perf_counter() - start:.0f} s")
    stages = (("flow", stage_flow, config.flow_seconds), ("guidance", stage_guidance, config.guidance_seconds))
    for name, stage, seconds in stages:
        kept = run.out / f"{name}.pt"
        if kept.exists():
            denoiser.load_state_dict(torch.load(kept, map_location=run.device))
        else:
            stage(run, seconds, denoiser, data)
            if run.rank == 0:
                keep(denoiser.state_dict(), kept)
    levels = stage_adapter(run, config.adapter_seconds, denoiser, data, COARSE)
    run.accelerator.end_training()
    if run.rank > 0:
        return
    model = save_model(run, denoiser, levels)
    classifier = SceneClassifier.load().to(run.device)
    save_defaults(model, guidance=evaluate(run, denoiser, levels, classifier))


if __name__ == "__main__":
    main()
