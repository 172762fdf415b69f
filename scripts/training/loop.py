"""The training loop: a budget of time and steps on any number of processes, weight averages, logs, checkpoints."""

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers import ModelMixin
from torch import Tensor, nn

from ddit.runtime.files import whole

REPORT_SECONDS = 10.0
FIRST_REPORT = 10  # steps; they compile and allocate, so the rate leaves them out
WARM_UP = 200  # steps
GRAPHS = 64  # that torch.compile may make of one block: with and without gradients, LoRA and so on


def load_flags() -> None:
    """How torch is to compute, in all trainings."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass crashed (torch 2.11, CUDA 13.0, H200)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch._dynamo.config.recompile_limit = GRAPHS
    torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs all the same, if slower
    # an assertion of this analysis fails for shapes that are free (torch 2.11)
    torch._inductor.config.triton.coalesce_tiling_analysis = False


@dataclass
class Progress:
    """How far training has come, over all its runs."""

    step: int = 0  # steps that have begun
    seconds: float = 0.0


class Log:
    """Writes every report's numbers to a CSV file, and to TensorBoard where that is installed."""

    def __init__(self, folder: Path, step: int):
        """Continue after ``step``: rows that an interrupted run wrote after its last checkpoint are dropped."""
        self._path = folder / "log.csv"
        self._rows: list[dict[str, Any]] = []
        if self._path.exists():
            with self._path.open(encoding="utf-8", newline="") as file:
                self._rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._board = None
        else:
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a row."""
        self._rows.append({"step": step, **{name: f"{value:.6g}" for name, value in values.items()}})
        with whole(self._path) as part, part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(self._rows[-1]))
            writer.writeheader()
            writer.writerows(self._rows)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()


def _in_bfloat16() -> Accelerator:
    """bfloat16 products beside float32 weights; twice as fast on a CPU with AVX-512 BF16 too."""
    return Accelerator(mixed_precision="bf16")


@dataclass(kw_only=True)
class Training:
    """Where and how training runs."""

    batch: int
    compile: bool = False
    dynamic: bool = False  # one compiled graph for all sizes; else every size has its own
    max_steps: int | None = None  # a limit beside the seconds
    accelerator: Accelerator = field(default_factory=_in_bfloat16)
    log: Log | None = None

    def __post_init__(self) -> None:
        self._losses: dict[str, list[Tensor]] = {}

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return torch.device(self.accelerator.device)

    @property
    def rank(self) -> int:
        """This process's number."""
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        """Processes that train together, one a GPU."""
        return int(self.accelerator.num_processes)

    def steps(
        self, seconds: float, optimizer: torch.optim.Optimizer, what: str, progress: Progress | None = None
    ) -> Iterator[int]:
        """Count steps, from ``progress`` on, until the time or `max_steps` is over.

        The learning rate warms up, holds, and falls over the last half.
        """
        progress = progress or Progress()
        self._losses.clear()
        peaks = [group["lr"] for group in optimizer.param_groups]
        warm_up = min(WARM_UP, max(1, self.max_steps // 10)) if self.max_steps else WARM_UP
        first, before, start = progress.step, progress.seconds, perf_counter()
        counted, since, reported, share = first, start, start, 0.0
        while True:
            progress.seconds = before + perf_counter() - start
            if (progress.step - first) % 10 == 0:
                share = self._from_first(progress.seconds / seconds)
            done = max(share, progress.step / self.max_steps if self.max_steps else 0.0)
            if done >= 1:
                break
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * min(1.0, (progress.step + 1) / warm_up) * min(1.0, 2 * (1 - done))
            progress.step += 1
            yield progress.step - 1
            if progress.step == first + FIRST_REPORT or perf_counter() - reported > REPORT_SECONDS:
                self._report(f"{what}: {done:.0%}", progress, counted, since)
                reported = perf_counter()
                if progress.step == first + FIRST_REPORT:
                    counted, since = progress.step, reported
        self._report(f"{what}: finished", progress, counted, since)

    def _report(self, message: str, progress: Progress, counted: int, since: float) -> None:
        """Say and log the mean losses since the last report, and the rate of the steps after ``counted``."""
        if not self._losses:
            return
        # waits for the device, so that the rate is that of finished steps
        losses = {name: torch.stack(values).mean().item() for name, values in self._losses.items()}
        self._losses.clear()
        rate = (progress.step - counted) / (perf_counter() - since)
        shown = [f"step {progress.step}", f"{rate:.2f} steps/s", *(f"{n} {loss:.4f}" for n, loss in losses.items())]
        self.say(f"{message}, {', '.join(shown)}")
        if self.log:
            self.log.write(progress.step, {"seconds": progress.seconds, "steps per second": rate, **losses})

    def say(self, message: str) -> None:
        """Print, once for all processes."""
        if self.rank == 0:
            print(message, flush=True)

    def _from_first(self, value: float) -> float:
        """The first process's value, so that all stop at the same step."""
        return float(broadcast(torch.tensor([value], device=self.device)).item())

    def start_together(self, parameters: Iterable[Tensor]) -> None:
        """Give every process the first one's values."""
        for parameter in parameters:
            broadcast(parameter.data)

    def update(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One optimiser step on a loss."""
        torch.autograd.backward(loss)
        self.step(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One optimiser step on the gradients, averaged over the processes, every group's clipped to norm 1."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.world > 1:
            mean = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
            for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def note(self, name: str, loss: Tensor) -> None:
        """Keep a loss for the report, on the device: reading it would wait for the GPU."""
        self._losses.setdefault(name, []).append(loss.detach())

    def autocast(self) -> Any:
        """The accelerator's mixed precision."""
        return self.accelerator.autocast()

    def compile_blocks(self, transformer: ModelMixin) -> None:
        """Compile a transformer where that pays: block by block, for these are alike and few are really compiled."""
        if self.compile:
            transformer.compile_repeated_blocks(dynamic=self.dynamic)


class Ema:
    """Exponential moving average of parameters, quick to forget at first."""

    def __init__(self, module: nn.Module, decay: float = 0.9995):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.shadow = [p.detach().clone() for p in self.parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the current values."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], weight)

    @torch.no_grad()
    def store(self) -> None:
        """Put the averages into the module."""
        for parameter, value in zip(self.parameters, self.shadow, strict=True):
            parameter.copy_(value)

    @contextmanager
    def stored(self) -> Iterator[None]:
        """The averages in the module for a while."""
        values = [p.detach().clone() for p in self.parameters]
        self.store()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, values, strict=True):
                    parameter.copy_(value)


def keep(value: object, path: Path) -> None:
    """Write a value whole or not at all."""
    with whole(path) as part:
        torch.save(value, part)
