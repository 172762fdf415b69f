"""The graphs that every family's bundle has around its levels."""

from collections.abc import Sequence

from ddit.exporter.graphs.job import GraphJob
from ddit.exporter.steps.growing import growing_job
from ddit.exporter.steps.guidance import guidance_job
from ddit.exporter.steps.prediction import prediction_job
from ddit.exporter.steps.update import step_job
from ddit.runtime.bundle.manifest import GuidanceInfo, LatentInfo, SamplerInfo


def sampling_jobs(
    latent: LatentInfo, native: int, coarse: Sequence[int], sampler: SamplerInfo, guidance: GuidanceInfo
) -> list[GraphJob]:
    """The step, the prediction and the grow graph, and the guide graph where a step runs its level twice."""
    jobs = [step_job(latent, native, coarse, sampler), prediction_job(latent), growing_job(latent)]
    return [*jobs, guidance_job(latent)] if guidance.two_passes else jobs
