"""scripts/soak.py: a server under all that clients do, and what grows is found."""

import re

import soak
from conftest import run
from ddit.runtime.serving.worker import Worker

SHORT = ("--backend", "cpu", "--minutes", 0.1, "--clients", 3)


def test_memory_stays_flat_whatever_clients_do(tiny_bundle):
    result = run(soak.main, tiny_bundle, *SHORT)
    assert result.exit_code == 0, result.stderr
    for outcome in ("picture: 200", "stream: 200", "leaves: 200", "hangs up", "hurries: 408", "asks wrongly: 400"):
        assert re.search(rf"\b{outcome} \d+", result.stdout), outcome
    assert "| resident |" in result.stdout


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
