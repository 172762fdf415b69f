"""ddit-export fp8: which products are in FP8, what their weights become, and that a bundle is never half of it."""

import json
import os
import shutil
import signal
from collections import Counter
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file

from conftest import run
from ddit.exporter import float8 as command
from ddit.exporter.cli import main
from ddit.exporter.graphs import float8
from ddit.runtime import Bundle, Pipeline
from ddit.runtime.backends.onnxruntime.host import FLOAT8, open_session
from ddit.runtime.cli import main as ddit_run
from ddit.runtime.errors import ModelError
from ddit.runtime.folders import locked
from ddit.runtime.policies import Fixed
from ddit.runtime.tools.verify import check_names, relative_error

SIZE = {"height": 128, "width": 64}


@pytest.fixture
def small(monkeypatch):
    """The tiny model's products are large enough."""
    monkeypatch.setattr(float8, "FEWEST", 16)


@pytest.fixture
def copied(tiny_bundle, tmp_path, small):
    return shutil.copytree(tiny_bundle, tmp_path / "copied.bundle")


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def products(path, file):
    """How many nodes of a graph there are of each kind of product, and the weights of those that stayed."""
    model = onnx.load(path / file, load_external_data=False)
    kinds = Counter(node.op_type for node in model.graph.node)
    return kinds, {node.input[1] for node in model.graph.node if node.op_type == "MatMul"}


def test_the_trunk_s_products_are_in_fp8(copied):
    before = Bundle.open(copied)
    result = run(main, "fp8", copied)
    assert result.exit_code == 0, result.stderr
    before.check_current()  # whoever has the bundle open goes on
    manifest = Bundle.open(copied).manifest
    for patch in manifest.patches:
        info = manifest.graphs[f"level-{patch}"]
        assert info.twins[FLOAT8] == f"level-{patch}.cuda-fp8.onnx"
        assert info.on(FLOAT8).weights == (*info.weights, "cuda-fp8.safetensors")
        assert info.on("cuda").weights == info.weights
        (kinds, left), (old, _) = products(copied, info.twins[FLOAT8]), products(copied, info.twins["cuda"])
        assert kinds["Float8MatMul"] + kinds["MatMul"] == old["MatMul"]
        assert kinds["Gemm"] == old["Gemm"]
        # 2 double and single blocks' products; embedding, head and LoRA's branches stay
        assert kinds["Float8MatMul"] >= 10
        assert not [name for name in left if "blocks." in name and "lora" not in name]
    errors = [result for result in manifest.parity if result.twin == FLOAT8]
    assert {result.graph for result in errors} == {level.graph for level in manifest.levels}
    assert all(1e-4 < result.error < 0.1 for result in errors)
    again = run(main, "fp8", copied)
    assert again.exit_code == 0
    assert "has its FP8 twins already" in again.stderr


def test_weights_are_rounded_as_torch_does_it(copied):
    assert run(main, "fp8", copied).exit_code == 0
    rounded, trunk = (load_file(copied / f"{name}.safetensors") for name in ("cuda-fp8", "transformer"))
    names = [name.removesuffix(".fp8") for name in rounded if name.endswith(".fp8")]
    assert len(rounded) == 2 * len(names)
    for name in names:
        weight = trunk[name].T.float()
        scale = weight.abs().amax(1, keepdim=True) / 448
        assert torch.equal(rounded[f"{name}.fp8_scale"], scale[:, 0])
        expected = (weight / scale).to(torch.float8_e4m3fn)
        assert torch.equal(rounded[f"{name}.fp8"].view(torch.uint8), expected.view(torch.uint8))


def test_pictures_in_fp8_are_nearly_the_same(copied):
    assert run(main, "fp8", copied).exit_code == 0
    levels = {"schedule": Fixed((2, 4, 8)), "seed": 3, **SIZE}
    exact, coarse = (Pipeline.open(copied, backend=name)("a red circle", **levels) for name in ("cpu", "cpu-fp8"))
    assert 1e-5 < relative_error(coarse.latent, exact.latent) < 0.1
    checked = run(ddit_run, "verify", copied, "--backend", "cpu-fp8")
    assert checked.exit_code == 0, checked.stderr
    assert "cuda-fp8" in run(ddit_run, "inspect", copied).stdout


def test_a_model_that_fp8_spoils_is_refused_and_the_bundle_stays(copied, monkeypatch):
    before = files(copied)
    monkeypatch.setattr(command, "FP8_TOLERANCE", 1e-6)
    result = run(main, "fp8", copied)
    assert result.exit_code == 1
    assert "level-2 in FP8 is off by" in result.stderr.splitlines()[-1]
    assert files(copied) == before


def test_a_bundle_without_twins_is_refused(copied):
    manifest = json.loads((copied / "bundle.json").read_text())
    for graph in manifest["graphs"].values():
        graph["twins"] = {}
    (copied / "bundle.json").write_text(json.dumps(manifest))
    result = run(main, "fp8", copied)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "level-2 has no twin for the cuda backend" in result.stderr


def test_a_bundle_in_bfloat16_is_refused_before_anything_is_written(copied):
    manifest = json.loads((copied / "bundle.json").read_text())
    for level in manifest["levels"]:
        manifest["graphs"][level["graph"]]["dtype"] = "bf16"
    (copied / "bundle.json").write_text(json.dumps(manifest))
    before = files(copied)
    result = run(main, "fp8", copied)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: level-2 is in bfloat16")
    assert "--dtype fp16" in result.stderr
    assert files(copied) == before


def test_a_model_without_large_products_is_refused(tiny_bundle):
    result = run(main, "fp8", tiny_bundle)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no products that are large enough for FP8" in result.stderr


@pytest.mark.parametrize("backend", ["cuda-fp8", "cpu-fp8"])
def test_without_the_twins_the_backends_say_what_to_do(tiny_bundle, backend):
    result = run(ddit_run, "generate", tiny_bundle, "red", "--backend", backend)
    assert result.exit_code == 1
    assert f"make them: ddit-export fp8 {tiny_bundle}" in result.stderr


def test_without_references_inputs_are_drawn(copied, monkeypatch):
    monkeypatch.setattr(command, "load_references", lambda bundle: {})
    assert run(main, "fp8", copied).exit_code == 0
    sizes = [one.sizes for one in Bundle.open(copied).manifest.parity if one.twin == FLOAT8]
    assert all(one["B"] == 1 for one in sizes)


@pytest.mark.parametrize("moment", ["write_tensors", "use_float8", "_run", "file_info"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), ModelError("unlucky")])
def test_whatever_goes_wrong_the_bundle_stays(copied, monkeypatch, moment, error):
    def fail(*_, **__):
        raise error

    before = files(copied)
    monkeypatch.setattr(command, moment, fail)
    result = run(main, "fp8", copied)
    assert result.exit_code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert "Traceback" not in result.stderr
    assert files(copied) == before


def test_ctrl_c_when_all_is_done_keeps_it(copied, monkeypatch):
    keep = Bundle.keep

    def interrupted(self, change):
        keep(self, change)
        raise KeyboardInterrupt

    monkeypatch.setattr(Bundle, "keep", interrupted)
    assert run(main, "fp8", copied).exit_code == 130
    bundle = Bundle.open(copied)
    assert [*bundle.verify_files()]
    assert all(FLOAT8 in bundle.graph(level.graph).twins for level in bundle.manifest.levels)


def test_what_a_killed_process_left_is_gone(copied):
    for name in (".cuda-fp8.partial-0.safetensors", "cuda-fp8.safetensors", ".level-2.cuda-fp8.partial-0.onnx"):
        (copied / name).write_bytes(b"half")
    assert run(main, "fp8", copied).exit_code == 0
    assert check_names(Bundle.open(copied)) == []


def test_two_processes_do_not_write_the_same_twins(copied):
    before = files(copied)
    with locked(copied / "level-2.cuda.onnx"):
        result = run(main, "fp8", copied)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"another process is writing the FP8 twins of {copied}; wait for its end" in result.stderr
    assert files(copied) == before


def test_a_small_disk_is_refused_before_anything_is_written(copied, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    result = run(main, "fp8", copied)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: not enough disk space in {copied}: FP8 needs")


def test_a_copy_by_hard_links_is_read(tiny_bundle, tmp_path, small):
    linked = shutil.copytree(tiny_bundle, tmp_path / "linked.bundle", copy_function=os.link)
    result = run(main, "fp8", linked)
    assert result.exit_code == 0, result.stderr


def test_ctrl_c_ends_a_run_that_takes_hours(tmp_path):
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["on"]), helper.make_node("Sin", ["x"], ["y"])],
        "body",
        [
            helper.make_tensor_value_info("number", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [1]),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["times", "", "start"], ["end"], body=body)],
        "loop",
        [
            helper.make_tensor_value_info("times", TensorProto.INT64, []),
            helper.make_tensor_value_info("start", TensorProto.FLOAT, [1]),
        ],
        [helper.make_tensor_value_info("end", TensorProto.FLOAT, [1])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "a.onnx")
    session = open_session(tmp_path / "a.onnx", fold=False)
    inputs = {"times": np.array(10**12), "start": np.ones(1, np.float32)}
    # whoever runs the tests in the background of a shell has SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            command._run(session, inputs)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_session_that_folds_nothing_holds_no_weights(tmp_path):
    size = 8192  # 134 MB in half precision
    weight = helper.make_tensor(
        "weight", TensorProto.FLOAT16, [size, size], np.full(size**2, 0.5, np.float16).tobytes(), raw=True
    )
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [1, size])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="a.bin")
    del model, graph, weight
    before = own_memory()
    session = open_session(tmp_path / "a.onnx", fold=False)
    assert own_memory() - before < 50e6
    assert session.run(None, {"x": np.ones((1, size), np.float16)})[0][0, 0] == size / 2


def own_memory():
    """Bytes of this process's memory that are no file's."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])
