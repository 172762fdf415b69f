"""A Ray cluster: the one that is running here or that ``RAY_ADDRESS`` names, or a new one on this machine alone."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ddit.runtime.backends.registry import kinds
from ddit.runtime.errors import BackendError, UsageError

OUR_ERROR = re.compile(r"ddit\.runtime\.errors\.\w+: (.+)")  # in the traceback of another process


@contextmanager
def cluster() -> Iterator[None]:
    """Be connected to it. Raises `BackendError` where Ray is not installed or there is no such cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # which would tell somebody else
    try:
        import ray
    except ModuleNotFoundError:
        raise BackendError("ray is not installed; run: pip install 'ddit[ray]'") from None
    if ray.is_initialized():  # by whoever calls us from Python
        yield
        return
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = os.environ.get("RAY_ADDRESS", "this machine")
        raise BackendError(f"cannot reach or start a Ray cluster at {where}: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


def on_gpus(backend: str | None) -> bool:
    """Whether a process with the model takes one of the cluster's GPUs."""
    import ray

    device = next((kind.device for kind in kinds() if kind.name == backend), None)
    if device is None and backend != "CPUExecutionProvider":  # chosen by every process, or another provider
        return bool(ray.cluster_resources().get("GPU", 0) >= 1)
    return device == "gpu"


def of_a_process(backend: str | None) -> dict[str, Any]:
    """What a process with the model takes of the cluster, as Ray's options."""
    return {"num_gpus": 1} if on_gpus(backend) else {"num_cpus": 1}


def pool(backend: str | None, replicas: tuple[int, int] | None, models: int = 1) -> tuple[int, int]:
    """The fewest and the most processes with each of so many models: up to all GPUs unless ``replicas`` says otherwise.

    Raises `UsageError` where the cluster cannot hold the fewest.
    """
    import ray

    gpus = on_gpus(backend)
    kind = "GPU" if gpus else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    least, most = replicas or (1, max(there, 1) if gpus else 1)
    if least * models > there:
        raise UsageError(f"processes with the model: {least * models}, as many as they need {kind}s; the Ray cluster "
                         f"has {there}; choose fewer --replicas, or another --backend")  # fmt: skip
    return least, most


def reason(told: str) -> str:
    """The line that says why a process has failed, from what Ray tells of it: ours where there is one."""
    found = OUR_ERROR.search(told)
    return found[1] if found else told.strip().splitlines()[-1]
