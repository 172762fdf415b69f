"""``ddit-run doctor`` on a machine without a GPU; test_onnxruntime_cuda.py has one with a fake."""

import json

import onnxruntime

from conftest import run
from ddit.runtime.backends.onnxruntime import kernels
from ddit.runtime.backends.registry import kinds
from ddit.runtime.cli import main
from ddit.runtime.tools import doctor


def test_what_is_here(monkeypatch):
    monkeypatch.setattr(doctor, "why_no_gpu", lambda: "no NVIDIA driver is installed")
    result = run(main, "doctor", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    machine = report["machine"]
    assert (machine["gpu"], machine["no_gpu"]) == (None, "no NVIDIA driver is installed")
    assert machine["libraries"]["onnxruntime"] == onnxruntime.__version__
    assert "CPUExecutionProvider" in machine["providers"]
    assert machine["kernels"] == (kernels.find_library() is not None)
    assert (report["backends"], report["levels"]) == ([], [])
    assert "none: no NVIDIA driver is installed" in run(main, "doctor").stdout


def test_what_a_bundle_becomes(tiny_bundle, monkeypatch):
    """Without a GPU: which backends open it and why the others do not, and what to expect of GPUs."""
    monkeypatch.setattr(doctor, "why_no_gpu", lambda: "no NVIDIA driver is installed")
    result = run(main, "doctor", tiny_bundle, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    backends = {one["name"]: one for one in report["backends"]}
    assert list(backends) == [kind.name for kind in kinds()]
    assert backends["cpu"] == {"name": "cpu", "ready": True, "says": "ready: cpu"}
    assert not any(one["ready"] for name, one in backends.items() if name != "cpu")
    assert "CUDAExecutionProvider" in backends["cuda"]["says"]
    level = report["levels"][0]
    assert (level["file"], level["on_cpu"]) == ("level-2.cuda.onnx", None)
    assert set(level["attention"].values()) == {"memory-efficient"}  # the bundle is in float32
    shown = run(main, "doctor", tiny_bundle).stdout
    assert "memory-efficient" in shown


def test_a_folder_that_is_no_bundle(tmp_path):
    result = run(main, "doctor", tmp_path)
    assert result.exit_code == 1
    assert "is not a bundle" in result.stderr
