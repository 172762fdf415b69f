"""The options of `train_adapter.py`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from command_line.options import option
from ddit.exporter.cli import Levels
from ddit.exporter.families import FLUX
from ddit.exporter.families.base import Family
from ddit.exporter.levels import AdapterConfig

MAX_STEPS = 10_000
LORA = ("feed-forward", "all")
RATES = {"adamw": 1e-4, "prodigy": 1.0}
POSITIVE = click.FloatRange(0, min_open=True)


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


@dataclass(frozen=True, kw_only=True)
class Config:
    """What was asked for. None leaves a value to the model, the profile or the optimizer."""

    # ---- the model and what it is trained on ----
    model: str = option(default=FLUX.model, help="Hub id, local diffusers folder, 'demo', or 'demo-video'.")
    revision: str | None = option(help="Branch, tag or commit of the model on the hub.")
    levels: tuple[int, ...] | None = option(
        type=Levels(), help="Patch sizes to train, as in 4,8.  [default: the model's, or 4]"
    )
    prompts: str | None = option(
        help="A file with a prompt a line, or the demos' scenes or clips: scenes:N, clips:START-STOP and so on."
    )
    latents: str = option(
        default="teacher",
        help="teacher: states that the native level's sampler goes through; student: the same with coarse steps among "
        "them; images:FOLDER: pictures with noise, each with a caption beside it (name.png, name.txt).",
    )
    out: Path = option(type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the results.")
    height: int | None = option(type=int, help="Pixels.  [default: the profile's optimum]")
    width: int | None = option(type=int, help="Pixels.  [default: the profile's optimum]")
    frames: int | None = option(type=click.IntRange(1), help="Of a clip.  [default: the profile's optimum]")
    text_length: int | None = option(type=click.IntRange(1), help="Tokens of a prompt.  [default: the model's]")
    steps: tuple[int, int] | None = option(
        type=Span(int), help="Denoising steps, or a range as in 20-50.  [default: the model's]"
    )
    guidance: tuple[float, float] | None = option(
        type=Span(float), help="Guidance scale, or a range as in 1-4.  [default: the model's]"
    )
    negative_prompt: str | None = option(
        help="What no clip shall show, where a model is guided by two passes.  [default: nothing]"
    )

    # ---- how much training ----
    batch: int = option(type=click.IntRange(1), default=4, help="States at once, on one device.")
    accumulate: int = option(type=click.IntRange(1), default=1, help="Batches of a training step.")
    max_steps: int | None = option(type=click.IntRange(1), help=f"Training steps.  [default: {MAX_STEPS}, or no limit]")
    minutes: float | None = option(type=POSITIVE, help="Training time, all runs together.")
    save_every: int = option(type=click.IntRange(1), default=500, help="Training steps.")

    # ---- the optimizer ----
    lr: float | None = option(type=POSITIVE, help="Learning rate.  [default: 1e-4, prodigy: 1]")
    optimizer: str = option(type=click.Choice(list(RATES)), default="adamw")
    ema: float = option(type=click.FloatRange(0, 1, max_open=True), default=0.999, help="Decay of the average.")

    # ---- the adapter's parts ----
    rank: int = option(type=click.IntRange(0), default=32, help="Rank of LoRA; 0 leaves it out.")
    lora: str = option(
        type=click.Choice(list(LORA)),
        default="feed-forward",
        help="Layers that get LoRA: feed-forward as in the paper, or these and the attention's.",
    )
    residual_width: int = option(
        type=click.IntRange(0),
        default=AdapterConfig.residual_width,
        help="Channels inside the residual path; 0 leaves it out.",
    )
    identity: bool = option("--identity/--no-identity", default=True, help="Have the identity vector.")
    resize: bool = option(
        "--resize/--no-resize", default=True, help="Start patch embedding and head from the native ones."
    )
    start: Path | None = option(
        type=click.Path(path_type=Path, dir_okay=False), help="Start from this adapter of such levels."
    )

    # ---- the machine ----
    precision: Literal["bf16", "fp32"] = option(
        type=click.Choice(["bf16", "fp32"]),
        default="bf16",
        help="Of the frozen model and of products; what is trained is always float32.",
    )
    gradient_checkpointing: bool = option(is_flag=True, help="Compute activations twice, to need less memory.")
    compiled: bool = option("--compile", is_flag=True, help="Use torch.compile.")
    seed: int = option(default=0)
    random_weights: bool = option(
        is_flag=True, help="Only try speed and memory: needs the model's configuration alone."
    )

    def parts(self, family: type[Family]) -> AdapterConfig:
        """What each level of a family gets beside its embedding and head."""
        targets = family.feed_forward if self.lora == "feed-forward" else (*family.feed_forward, *family.attention)
        return AdapterConfig(
            rank=self.rank,
            alpha=float(self.rank),
            targets=targets,
            residual_width=self.residual_width,
            identity=self.identity,
        )
