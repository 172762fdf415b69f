"""Train the video demo: VAE, transformer with its text encoder, adapter; about 8 minutes on one GPU or two.

    torchrun --nproc-per-node 2 scripts/train_demo_video.py --out runs/video --total-seconds 500
    cp -r runs/video/model exporter/demo-video

Work: a clip has 17 frames of 128×128, a latent of 5 frames of 16×16, and 320 tokens. 9.1 M parameters make 5.6 GFLOP
for a clip forward, 17 with the way back. At the 145 to 175 TFLOP/s of the picture demo (scripts/train_demo.py) that is
9,000 clips a second, or 45 steps of 192 clips, and 10,000 steps in 230 seconds.
Uncompiled it was a third of that there.
A clip takes 62 MB of activations, a batch of 192 clips 12 GB.

The VAE takes 36 GFLOP forward for a window of 9 frames and 108 with the way back, nearly all of it in convolutions of
16 and 32 channels, which use a small part of a GPU: at 20 TFLOP/s 8 windows are 43 ms, about as long as their kernels
take to start, so 120 seconds are 2,000 steps or so. A window takes 0.4 GB of activations. Encoding is 22 GFLOP a clip.

Stages run in order and leave their results in --out; a run that was interrupted goes on where it was a minute before.
What has no memory for its batch takes half of it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch

from command_line.options import option, options
from demo_model.course import load_flags
from demo_video.parts import TINY, Sizes, make_vae
from demo_video.results import save_model, show
from demo_video.stages import ClipRun, Denoiser, encode_data, stage_adapter, stage_flow, stage_vae, start_from

COARSE = (4,)  # levels
FINISHING = 30.0  # seconds to save and to draw in


@dataclass(frozen=True, kw_only=True)
class Config:
    """What was asked for."""

    out: Path = option(
        type=click.Path(path_type=Path), required=True, help="Folder for results; finished stages are kept."
    )
    initial: Path | None = option(
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        help="A saved model, or its vae alone, whose weights training begins with.  [default: random ones]",
    )
    preset: str = option(
        type=click.Choice(["demo", "tiny"]), default="demo", show_default=False, help="tiny: a smoke test on a CPU."
    )
    compiled: bool = option(
        "--compile/--no-compile", default=torch.cuda.is_available(), show_default=False, help="Use torch.compile."
    )
    batch: int = option(default=192, help="Clips of a step and process.")
    vae_batch: int = option(default=8, help="Windows of 9 frames of a step of the VAE and process.")
    clips: int = option(default=48_000, help="Training clips.")
    vae_seconds: float = option(default=120.0)
    encode_seconds: float = option(default=35.0, help="For the training clips; what is not done then is left out.")
    flow_seconds: float = option(default=230.0)
    adapter_seconds: float = option(default=60.0)
    total_seconds: float = option(default=float("inf"), help="When to be finished: stages are cut to fit.")

    def run(self) -> ClipRun:
        """What all stages need."""
        common: dict[str, Any] = {"out": self.out, "compile": self.compiled}
        if self.preset == "tiny":
            return ClipRun(**common, sizes=TINY, clips=8, batch=2, vae_batch=2, max_steps=2)
        return ClipRun(**common, sizes=Sizes(), clips=self.clips, batch=self.batch, vae_batch=self.vae_batch)


@click.command()
@options(Config)
def main(**given: Any) -> None:
    """Train the video demo."""
    load_flags()
    torch.backends.cudnn.benchmark = True  # the VAE's sizes are fixed, and its odd convolutions have slow kernels too
    config = Config(**given)
    run = config.run()
    torch.manual_seed(run.rank)
    run.out.mkdir(parents=True, exist_ok=True)

    denoiser, vae = Denoiser(run.sizes), make_vae(run.sizes)
    if config.initial is not None:
        start_from(config.initial, denoiser, vae)
    denoiser.to(run.device)
    if not (run.out / "vae").exists():
        stage_vae(run, config.vae_seconds, vae)
        run.accelerator.wait_for_everyone()
    del vae
    data = encode_data(run, config.encode_seconds, denoiser)
    run.say(f"latents: {len(data.ids)} a process")
    run.compile_blocks(denoiser.transformer)
    kept = run.out / "flow.pt"
    if kept.exists():
        denoiser.load_state_dict(torch.load(kept, map_location=run.device))
    else:
        run = replace(run, deadline=config.total_seconds - FINISHING - config.adapter_seconds)
        stage_flow(run, config.flow_seconds, denoiser, data).finish(denoiser.state_dict(), kept)
    if run.rank == 0:
        save_model(run, denoiser, {})  # something to look at, should the rest fail
        show(run, denoiser, {})
    # compiling two levels would take longer than it saves
    run = replace(run, compile=False, deadline=config.total_seconds - FINISHING)
    levels = stage_adapter(run, config.adapter_seconds, denoiser, data, COARSE)
    run.accelerator.end_training()
    if run.rank > 0:
        return
    save_model(run, denoiser, levels)
    run.say(f"{run.out / 'model'} is finished")
    show(run, denoiser, levels)


if __name__ == "__main__":
    main()
