"""A training stage on its course: optimiser and average, kept every minute, so that an interrupted run goes on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from demo_model.buckets import Bucket
from demo_model.parts import Sizes
from training.loop import Ema, Progress, Training, keep

KEEP_SECONDS = 60.0
GRAPHS = 64  # that torch.compile may make of one block: with and without gradients, LoRA and so on
STARTED = perf_counter()


@dataclass(kw_only=True)
class Run(Training):
    """Where a demo's training runs, and where its results go."""

    out: Path

    def test_scenes(self, count: int) -> int:
        """How many scenes to judge: fewer in a smoke test."""
        return count if self.max_steps is None else 4

    def say(self, message: str) -> None:
        """Print, once for all processes, after the seconds since the start."""
        super().say(f"{perf_counter() - STARTED:5.0f} s  {message}")


@dataclass(kw_only=True)
class PictureRun(Run):
    """What all stages of the picture demo need."""

    sizes: Sizes
    buckets: tuple[Bucket, ...]
    shown: tuple[Bucket, ...] = ()  # sizes of pictures that nobody judges, but somebody may look at
    scenes: int


def load_flags() -> None:
    """How torch is to compute, in all trainings of demos."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass crashed (torch 2.11, CUDA 13.0, H200)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.recompile_limit = GRAPHS
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs all the same, if slower
    # an assertion of this analysis fails for shapes that are free (torch 2.11)
    torch._inductor.config.triton.coalesce_tiling_analysis = False


def fitting_batch(run: Run, batch: int, attempt: Callable[[int], object]) -> int:
    """The largest of a batch, its half, its quarter, … that an attempt has memory for; the same for all processes.

    ``attempt``: runs a step's forward and backward passes at a batch, and speaks to no other process.
    """
    while True:
        try:
            attempt(batch)
            break
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        torch.cuda.empty_cache()  # not before the exception is gone, which holds the activations
        run.say(f"not enough memory; trying batches of {batch}")
    found = run.accelerator.gather(torch.tensor([batch], device=run.device))
    return int(found.min().item())


class Course:
    """What a stage changes: parameters, their average, the optimiser's state, how far it has come."""

    def __init__(
        self,
        run: Run,
        name: str,
        trained: nn.Module,
        *,
        lr: float,
        decay: float,
        weight_decay: float = 0.0,
        groups: Sequence[dict[str, Any]] | None = None,
        fused: bool = True,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        """``lr``: the highest learning rate. ``decay``: of the average. ``groups``: parameters clipped together.

        ``optimizer``: one with that rate, in place of AdamW.

        ``fused``: one kernel for the optimiser's step, which needs gradients to lie in memory as their parameters do.
        """
        self.run, self.name, self.trained, self.lr = run, name, trained, lr
        run.start_together(trained.parameters())
        self.optimizer = optimizer or torch.optim.AdamW(
            groups or trained.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=fused
        )
        self.ema, self.progress = Ema(trained, decay), Progress()

    @property
    def checkpoint(self) -> Path:
        """Where an unfinished stage is kept."""
        return self.run.out / f"{self.name}.checkpoint"

    def steps(self, seconds: float) -> Iterator[int]:
        """Count steps until the time is over, all runs together; then the averages are in the module."""
        self._restore()
        kept = perf_counter()
        for step in self.run.steps(seconds, self.optimizer, self.name, self.progress):
            yield step
            self.ema.update(step)
            if perf_counter() - kept > KEEP_SECONDS:
                self._keep()
                kept = perf_counter()
        self.ema.store()

    def finish(self, result: object, path: Path) -> None:
        """Keep the stage's result in place of its checkpoint, once for all processes."""
        if self.run.rank == 0:
            keep(result, path)
            self.checkpoint.unlink(missing_ok=True)

    def _keep(self) -> None:
        if self.run.rank == 0:
            content = {
                "trained": self.trained.state_dict(),
                "ema": self.ema.shadow,
                "optimizer": self.optimizer.state_dict(),
                "progress": asdict(self.progress),
            }
            keep(content, self.checkpoint)

    def _restore(self) -> None:
        if not self.checkpoint.exists():
            return
        content: dict[str, Any] = torch.load(self.checkpoint, map_location=self.run.device)
        self.trained.load_state_dict(content["trained"])
        self.ema.shadow = content["ema"]
        self.optimizer.load_state_dict(content["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr  # the highest one, not where the schedule stood
        self.progress = Progress(**content["progress"])
        torch.manual_seed(self.progress.step * self.run.world + self.run.rank)  # other noise than before
        self.run.say(f"{self.name}: going on after step {self.progress.step}")
