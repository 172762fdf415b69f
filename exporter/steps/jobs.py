"""The graphs that every family's bundle has around its levels."""

from collections.abc import Sequence

from ddit.exporter.graphs.job import GraphJob
from ddit.exporter.steps.growing import growing_job
from ddit.exporter.steps.prediction import prediction_job
from ddit.exporter.steps.update import step_job


def sampling_jobs(channels: int, native: int, coarse: Sequence[int]) -> list[GraphJob]:
    """The step, the prediction and the grow graph, for a latent of so many channels and the levels' patches."""
    return [step_job(channels, native, coarse), prediction_job(channels), growing_job(channels)]
