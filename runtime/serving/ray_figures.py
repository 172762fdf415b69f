"""`/metrics` of a cluster: the ingress's own figures, and those of every replica with engines."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray.serve.handle import DeploymentHandle

from ddit.runtime.serving.metrics import Figures

PATIENCE = 5.0  # seconds for replicas to answer


class ClusterFigures(Figures):
    """What an ingress replica shows."""

    def __init__(self) -> None:
        super().__init__()
        self.retried = Counter(
            "ddit_retried", "Requests asked of another replica because one was lost", registry=self.registry
        )
        self.engines: dict[str, DeploymentHandle] = {}  # by model

    async def text(self) -> bytes:
        """All figures; replicas' with the names of model and replica, without those of replicas that do not answer."""
        found: dict[tuple[str, str], str] = {}
        for model, handle in self.engines.items():
            answers = await handle.broadcast("figures").results_async(timeout_s=PATIENCE, return_exceptions=True)
            for answer in answers:
                if not isinstance(answer, BaseException):
                    replica, text = answer
                    found[model, replica] = text
        return await super().text() + joined(found)


def joined(texts: Mapping[tuple[str, str], str]) -> bytes:
    """Figures of replicas, by model and replica, as one text in which every sample carries both names."""
    registry = CollectorRegistry()
    registry.register(_Joined(texts))
    return generate_latest(registry)


class _Joined(Collector):
    def __init__(self, texts: Mapping[tuple[str, str], str]):
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        """The families, each once."""
        families: dict[str, Metric] = {}
        for (model, replica), text in self._texts.items():
            for family in text_string_to_metric_families(text):
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                whole.samples += [
                    sample._replace(labels={**sample.labels, "model": model, "replica": replica})
                    for sample in family.samples
                ]
        # a family of the ingress's own may stand without samples in a replica's, and no text may name it twice
        yield from (family for family in families.values() if family.samples)
