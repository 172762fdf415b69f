"""ddit-run serve refuses what it cannot serve, in one line."""

import shutil
import socket

import pytest

from conftest import run
from ddit.runtime.cli import main


def test_a_port_that_is_taken(tiny_bundle):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run(main, "serve", tiny_bundle, "--backend", "cpu", "--port", taken.getsockname()[1])
    assert result.exit_code == 2
    assert "choose another --host or --port" in result.stderr


@pytest.mark.parametrize("host", ["no such host", "256.256.256.256", "x" * 300, "\udcff"])
def test_a_host_that_is_none(tiny_bundle, host):
    result = run(main, "serve", tiny_bundle, "--backend", "cpu", "--host", host)
    assert result.exit_code == 2
    assert "cannot listen" in result.stderr


def test_engines_that_do_not_open(tiny_bundle, tmp_path):
    """The server ends where only another bundle can help."""
    broken = shutil.copytree(tiny_bundle, tmp_path / "broken.bundle")
    graph = broken / "level-4.onnx"
    graph.write_bytes(bytes(graph.stat().st_size))
    result = run(main, "serve", broken, "--backend", "cpu", "--port", 0)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: the engine room has stopped: ")
