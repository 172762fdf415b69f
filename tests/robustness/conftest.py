"""Fixtures of the robustness tests: a copy of the tiny bundle to damage, and how many examples to try."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from outcomes import Elsewhere


@pytest.fixture(scope="session")
def victim(tiny_bundle, tmp_path_factory) -> Path:
    """A copy of the tiny bundle. Whoever damages it repairs it."""
    return shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("robustness") / "victim.bundle")


@pytest.fixture(scope="session")
def elsewhere():
    """Another process for what may crash."""
    process = Elsewhere()
    yield process
    process.close()


@pytest.fixture(scope="session")
def examples(pytestconfig):
    """How many examples a test tries: a few, or with ``--thorough`` many, others every time."""

    def tried(few: int, many: int) -> settings:
        thorough = pytestconfig.getoption("--thorough")
        return settings(
            max_examples=many if thorough else few,
            derandomize=not thorough,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )

    return tried
