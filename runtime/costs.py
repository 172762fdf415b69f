"""What pictures cost on a backend, for time budgets: known from a calibration, or measured."""

import logging
from typing import TYPE_CHECKING

from ddit.runtime.bundle.manifest import Costs
from ddit.runtime.policies import Fixed

if TYPE_CHECKING:
    from ddit.runtime.pipeline import Pipeline

log = logging.getLogger(__name__)


def measure_costs(pipeline: "Pipeline", height: int, width: int, repeat: int = 7) -> Costs:
    """Time a few steps of all levels in turn, after one of each that warms up."""
    patches = pipeline.bundle.manifest.patches
    warm_up(pipeline, height, width)
    trace = pipeline("measure", schedule=Fixed(patches * repeat), height=height, width=width).trace
    times = trace.milliseconds_per_level()
    return Costs(levels=times, encode=trace.encode_milliseconds, decode=trace.decode_milliseconds)


def find_costs(pipeline: "Pipeline", height: int, width: int) -> Costs:
    """The costs at a size in pixels. Afterwards every engine is loaded: no budget could hold that."""
    for known in pipeline.bundle.manifest.calibrations:
        if (known.height, known.width, known.backend) == (height, width, str(pipeline.backend)):
            warm_up(pipeline, height, width)
            return known.costs
    log.info("measuring the levels at %d×%d", height, width)
    return measure_costs(pipeline, height, width)


def warm_up(pipeline: "Pipeline", height: int, width: int) -> None:
    """One step of every level."""
    pipeline("warm up", schedule=Fixed(pipeline.bundle.manifest.patches), height=height, width=width)
