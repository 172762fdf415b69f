"""What the training scripts share: a loop with a time budget, on any number of processes, and averaged weights."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(kw_only=True)
class Training:
    """Where and how training runs."""

    device: str = "cpu"
    batch: int
    compile: bool = False
    max_steps: int | None = None  # a smoke test's limit, beside the seconds
    rank: int = 0
    world: int = 1  # processes that train together, one a GPU

    def steps(self, seconds: float, optimizer: torch.optim.Optimizer, what: str) -> Iterator[int]:
        """Count steps until the time is over; the learning rate warms up, holds, and falls over the last half."""
        peak = optimizer.param_groups[0]["lr"]
        start = reported = perf_counter()
        step, done = 0, 0.0
        while step != self.max_steps:
            if step % 10 == 0 and (done := self._from_first((perf_counter() - start) / seconds)) >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1.0, (step + 1) / 200) * min(1.0, 2 * (1 - done))
            yield step
            step += 1
            if perf_counter() - reported > 10:
                reported = perf_counter()
                rate = step / (reported - start)
                self.say(f"{what}: {done:.0%}, step {step}, {rate:.1f} steps/s, {self.losses(what)}")
        self.say(f"{what}: finished after {step} steps, {self.losses(what)}")

    def say(self, message: str) -> None:
        """Print, once for all processes."""
        if self.rank == 0:
            print(message, flush=True)

    def _from_first(self, value: float) -> float:
        """The first process's value, so that all stop at the same step."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], device=self.device)
        dist.broadcast(shared, 0)
        return shared.item()

    def start_together(self, parameters: Iterable[Tensor]) -> None:
        """Give every process the first one's values."""
        if self.world > 1:
            for parameter in parameters:
                dist.broadcast(parameter.data, 0)

    def update(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One optimiser step on the gradient, averaged over the processes and clipped to norm 1."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.world > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            parts = (flat / self.world).split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    def __post_init__(self) -> None:
        self._losses: dict[str, Tensor] = {}

    def note(self, what: str, loss: Tensor) -> None:
        """Keep a running mean of a loss on the device; reading it waits for the GPU, so that is left to the report."""
        old = self._losses.get(what)
        self._losses[what] = loss.detach() if old is None else old.lerp(loss.detach(), 0.02)

    def losses(self, what: str) -> str:
        """The running means of a stage."""
        return ", ".join(f"{n} {v.mean().item():.4f}" for n, v in self._losses.items() if n.startswith(what))

    def autocast(self) -> torch.autocast:
        """Products in bfloat16, beside float32 weights; twice as fast on a CPU with AVX-512 BF16 too."""
        return torch.autocast(self.device, torch.bfloat16)

    def compiled(self, module: nn.Module) -> nn.Module:
        """The module, compiled where that pays."""
        return torch.compile(module, dynamic=False) if self.compile else module  # type: ignore[return-value]


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


def join() -> tuple[str, int, int]:
    """Device, rank and number of processes; joins the others where torchrun started several."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    torch.manual_seed(rank)
    return device, rank, world
