"""What pictures cost on a backend, for time budgets: known from a calibration, or measured."""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ddit.runtime.bundle.manifest import Costs
from ddit.runtime.policies import Fixed, Prediction, Reuse, Reusing, RunHistory
from ddit.runtime.shapes import Size

if TYPE_CHECKING:
    from ddit.runtime.pipeline import Pipeline

log = logging.getLogger(__name__)


def measure_costs(pipeline: "Pipeline", size: Size, repeat: int = 7) -> Costs:
    """Time a few steps of all levels in turn and a few predicted ones, after one of each that warms up."""
    patches = pipeline.bundle.manifest.patches
    warm_up(pipeline, size)
    trace = pipeline(
        "measure",
        schedule=_every_kind(patches * repeat, repeat),
        height=size.height,
        width=size.width,
        frames=size.frames,
    ).trace
    return Costs(
        levels=trace.milliseconds_per_level(),
        predicted=trace.milliseconds_predicted(),
        encode=trace.encode_milliseconds,
        decode=trace.decode_milliseconds,
    )


def find_costs(pipeline: "Pipeline", size: Size) -> Costs:
    """The costs at a size. Afterwards every engine is loaded: no budget could hold that."""
    calibrations = () if pipeline.tiled(size) else pipeline.bundle.manifest.calibrations  # which decoded whole latents
    for known in calibrations:
        if (known.size, known.backend) == (size, str(pipeline.backend)):
            warm_up(pipeline, size)
            return known.costs
    log.info("measuring the levels at %s", size)
    return measure_costs(pipeline, size)


def warm_up(pipeline: "Pipeline", size: Size) -> None:
    """One step of every kind."""
    pipeline(
        "warm up",
        schedule=_every_kind(pipeline.bundle.manifest.patches, 1),
        height=size.height,
        width=size.width,
        frames=size.frames,
    )


@dataclass(frozen=True)
class _AtTheEnd(Reuse):
    """The last steps repeat the last velocity."""

    count: int
    name = "measure"

    def predict(self, history: RunHistory) -> Prediction:
        return Prediction((1.0,), history.step >= history.steps - self.count)

    def __str__(self) -> str:
        return f"measure:{self.count}"


def _every_kind(levels: tuple[int, ...], predicted: int) -> Reusing:
    """A step at each of these levels, then so many predicted ones."""
    return Reusing(Fixed((*levels, *levels[-1:] * predicted)), _AtTheEnd(predicted))
