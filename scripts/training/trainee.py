"""An adapter in training: its state, its checkpoints, and the loop."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ddit.exporter.adapter import save_adapter
from ddit.runtime.errors import DditError
from ddit.runtime.files import whole
from training.distillation import Distillation
from training.loop import Ema, Log, Progress, Training, keep
from training.states import StateSource


@dataclass
class Trainee:
    """The state that training changes, saved to checkpoints and restored from them."""

    run: Training
    out: Path
    base_model: str
    family: str
    distillation: Distillation
    optimizer: torch.optim.Optimizer
    ema: Ema
    states: StateSource
    progress: Progress = field(default_factory=Progress)

    @property
    def adapter(self) -> Path:
        """The adapter's file."""
        return self.out / "adapter.safetensors"

    def _checkpoint(self, rank: int) -> Path:
        return self.out / f"checkpoint-{rank}.pt"

    def save(self) -> None:
        """Write a checkpoint, each process its own part, and the adapter with averaged weights."""
        own = self.distillation.own
        if not torch.stack([parameter.isfinite().all() for parameter in own]).all():
            raise DditError("training diverged; give the command again with a lower --lr: it goes on from before")
        content: dict[str, Any] = {"states": self.states.state_dict()}
        if self.run.rank == 0:
            with whole(self.adapter) as part, self.ema.stored():
                save_adapter(part, self.distillation.levels, base_model=self.base_model, family=self.family)
            content |= {
                "own": own.state_dict(),
                "ema": self.ema.shadow,
                "optimizer": self.optimizer.state_dict(),
                "progress": asdict(self.progress),
            }
        keep(content, self._checkpoint(self.run.rank))

    def restore(self) -> None:
        """Go on from the checkpoint, where there is one."""
        if (first := self._read(0)) is None:
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.distillation.own.load_state_dict(first["own"])
        self.ema.shadow = first["ema"]
        self.optimizer.load_state_dict(first["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # the one asked for now, not where the schedule stood
        self.progress = Progress(**first["progress"])
        mine = first if self.run.rank == 0 else self._read(self.run.rank)
        if mine is not None:  # there are more processes than before where it is
            self.states.load_state_dict(mine["states"])
        self.run.say(f"going on after step {self.progress.step}")

    def _read(self, rank: int) -> dict[str, Any] | None:
        path = self._checkpoint(rank)
        if not path.exists():
            return None
        try:
            content: dict[str, Any] = torch.load(path, map_location=self.run.device)
        except (OSError, EOFError, RuntimeError, UnpicklingError):
            raise DditError(f"{path} cannot be read; delete it to start anew") from None
        return content


def train(trainee: Trainee, seconds: float, accumulate: int, save_every: int) -> None:
    """Train until the time or the steps are over, saving in between and at the end."""
    run = trainee.run
    if run.rank == 0:
        run.log = Log(trainee.out, trainee.progress.step)
    run.say("losses are shares of the variance of the native level's velocity")
    for step in run.steps(seconds, trainee.optimizer, "adapter", trainee.progress):
        for _ in range(accumulate):
            trainee.states.advance(trainee.distillation.backward(trainee.states.draw(), 1 / accumulate))
        run.step(trainee.optimizer)
        trainee.ema.update(step)
        if (step + 1) % save_every == 0:
            trainee.save()
    trainee.save()
