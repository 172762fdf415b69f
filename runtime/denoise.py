"""The loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ddit.runtime.backends.base import FloatArray
from ddit.runtime.session import Sample, Session
from ddit.runtime.trace import StepRecord


@dataclass(frozen=True)
class Progress:
    """What a callback is told after every step."""

    step: int  # that was done, from 0; the furthest one where samples differ
    steps: int  # of the run
    records: list[StepRecord]  # what the samples' last steps did
    latents: Callable[[], list[FloatArray]]  # copies of the samples' latents, each (C, H, W)

    @property
    def levels(self) -> list[int | None]:
        """The levels that the samples' last steps ran at; None where a step was predicted."""
        return [record.level for record in self.records]


OnStep = Callable[[Progress], None]


def denoise(session: Session, samples: Sequence[Sample], on_step: OnStep | None = None) -> None:
    """Step samples of a session until all are done."""
    while not all(sample.done for sample in samples):
        session.step()
        if on_step is not None:
            furthest = max(samples, key=lambda sample: sample.history.step)
            records = [sample.trace.steps[-1] for sample in samples]
            step, steps = furthest.history.step - 1, furthest.run.steps
            on_step(Progress(step, steps, records, lambda: [session.latent(sample) for sample in samples]))
