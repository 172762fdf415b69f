"""scripts/soak.py: a server under all that clients do, and what grows is found."""

import re

import pytest

import soak
from conftest import run
from ddit.runtime import Bundle, Pipeline
from ddit.runtime.serving.worker import Worker
from fake_engines import fake_pipeline

SHORT = ("--minutes", 0.1, "--clients", 3)


@pytest.fixture(autouse=True)
def _engines_that_cost_nothing(monkeypatch):
    """Everything before them is the real server, under more requests than it gets otherwise."""
    monkeypatch.setattr(Pipeline, "open", lambda path, **options: fake_pipeline(Bundle.open(path))[0])


def test_memory_stays_flat_whatever_clients_do(tiny_bundle):
    result = run(soak.main, tiny_bundle, *SHORT)
    assert result.exit_code == 0, result.stderr
    for outcome in ("picture: 200", "stream: 200", "leaves: 200", "hangs up", "hurries: ", "asks wrongly: 400"):
        assert re.search(rf"\b{outcome}", result.stdout), outcome
    assert "| resident |" in result.stdout
    assert int(result.stdout.split()[0]) > 20


def test_a_server_that_keeps_what_it_made_is_found(tiny_bundle, monkeypatch):
    kept, tell = [], Worker._tell

    def tell_and_keep(worker, event):
        kept.append((event, bytearray(100_000)))
        tell(worker, event)

    monkeypatch.setattr(Worker, "_tell", tell_and_keep)
    result = run(soak.main, tiny_bundle, *SHORT)
    assert result.exit_code == 1
    assert "memory grew" in result.stderr
    assert re.search(r"\| scripts/test_soak\.py:\d+ \| \+\d", result.stdout)
