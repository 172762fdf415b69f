"""ddit-export from the outside: bundles appear whole or not at all, and bad input ends in one line."""

import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import run
from ddit.exporter.cli import main
from ddit.exporter.families.flux.model import Flux
from ddit.exporter.graphs import weights
from ddit.exporter.graphs.weights import WeightFiles
from ddit.exporter.steps.update import step_job
from ddit.runtime import Bundle, Pipeline
from tiny import save_tiny_adapter

FAST = ("--levels", "2", "--dtype", "fp32", "--profile", "256")


@pytest.fixture
def only_the_step_graph(monkeypatch) -> None:
    """Leave the slow graphs out where a test is not about them."""
    monkeypatch.setattr(Flux, "jobs", lambda flux: [step_job(flux.latent, 2, (), flux.sampler)])
    monkeypatch.setattr("ddit.exporter.build.check_pipeline", lambda *_: [])
    monkeypatch.setattr("ddit.runtime.bundle.manifest.check_manifest", lambda _: None)  # the others are missing


def one_error(result, code: int, words: str) -> None:
    assert result.exit_code == code, result.stderr
    errors = [line for line in result.stderr.strip().splitlines() if line.lower().startswith("error")]
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--levels", "2,x"], 2, "give patch sizes separated by commas"),
        (["--levels", "4,8"], 2, "the native level 2 must be among the levels"),
        (["--levels", "2,3"], 2, "level 3 is not a multiple"),
        (["--profile", "tiny"], 2, "unknown profile 'tiny'; built in: 1024, 128-384, 2048, 256, 512"),
        (["--adapter", "missing.safetensors"], 1, "missing.safetensors does not exist"),
        (["--dtype", "int3"], 2, "'int3' is not one of"),
        (["--opset", "16"], 2, "16 is not in the range 17<=x<=23"),
        (
            ["--opset", "17", "--dtype", "bf16"],
            2,
            "opset 17 is for TensorRT 8.6, which has no bfloat16; add --dtype fp16",
        ),
    ],
)
def test_bad_options(tiny_pipeline, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    one_error(run(main, "flux", "--model", tiny_pipeline, *arguments), code, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("no/such/folder", "is neither a folder nor a hub id"),
        ("./nothing", "is neither a folder nor a hub id"),
        (".", "is not a diffusers pipeline: it has no model_index.json"),
    ],
)
def test_bad_models(tmp_path, monkeypatch, model, words):
    monkeypatch.chdir(tmp_path)
    one_error(run(main, "flux", "--model", model), 1, words)


def test_a_gated_model_says_how_to_log_in(monkeypatch):
    import httpx2
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_, **__):
        raise GatedRepoError("gated", response=httpx2.Response(403, request=httpx2.Request("GET", "http://localhost")))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    one_error(
        run(main, "flux"), 1, "accept its licence at https://huggingface.co/black-forest-labs/FLUX.1-dev, then log in"
    )


def change_json(path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: change_json(p / "model_index.json", _class_name="WanPipeline"), "holds a WanPipeline"),
        (lambda p: change_json(p / "scheduler/scheduler_config.json", use_karras_sigmas=True), "use_karras_sigmas"),
        (lambda p: change_json(p / "scheduler/scheduler_config.json", _class_name="DDIM"), "scheduler DDIM"),
        (lambda p: shutil.rmtree(p / "vae"), "vae"),
        (lambda p: shutil.rmtree(p / "tokenizer_2"), "tokenizer_2 cannot be read"),
        (lambda p: next((p / "transformer").glob("*.safetensors")).unlink(), "has no .safetensors files"),
        (lambda p: truncate(next((p / "transformer").glob("*.safetensors"))), "download it again"),
        (lambda p: drop_tensor(p / "transformer"), "norm_out.linear.bias"),
    ],
)
def test_broken_pipelines(tiny_pipeline, tmp_path, spoil, words):
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    spoil(model)
    one_error(run(main, "flux", "--model", model, *FAST, "--out", tmp_path / "out.bundle"), 1, words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def truncate(path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def drop_tensor(folder) -> None:
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    del tensors["norm_out.linear.bias"]
    save_file(tensors, path)


@pytest.mark.parametrize("where", ["folder", "file"])
def test_an_output_that_is_something_else_is_left_alone(tiny_pipeline, tmp_path, where):
    out = tmp_path / "precious"
    if where == "folder":
        out.mkdir()
        (out / "thesis.txt").write_text("words")
    else:
        out.write_text("words")
    one_error(run(main, "flux", "--model", tiny_pipeline, *FAST, "--out", out), 2, "exists and is not a bundle")
    assert out.exists()


def test_an_output_that_cannot_be_written(tiny_pipeline, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out.bundle"
    one_error(run(main, "flux", "--model", tiny_pipeline, *FAST, "--out", out), 1, "cannot be written")


@pytest.mark.usefixtures("only_the_step_graph")
def test_a_full_disk_is_found_before_writing(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: SimpleNamespace(free=-1))
    result = run(main, "flux", "--model", tiny_pipeline, *FAST, "--out", tmp_path / "out.bundle")
    one_error(result, 1, "not enough disk space")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("only_the_step_graph")
def test_a_disk_that_fills_up_while_writing(tiny_pipeline, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WeightFiles, "write", full)
    result = run(main, "flux", "--model", tiny_pipeline, *FAST, "--out", tmp_path / "out.bundle")
    one_error(result, 1, "no space left on the disk")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("only_the_step_graph")
def test_a_failed_parity_leaves_the_old_bundle(tiny_pipeline, tmp_path, monkeypatch):
    out = tmp_path / "out.bundle"
    assert run(main, "flux", "--model", tiny_pipeline, *FAST, "--out", out).exit_code == 0
    before = (out / "bundle.json").read_text()
    monkeypatch.setattr("ddit.exporter.parity.relative_error", lambda *_: 0.5)
    result = run(main, "flux", "--model", tiny_pipeline, *FAST, "--out", out)
    one_error(result, 1, "graph step does not compute what the model computes: relative error of next_latent is 0.5")
    assert (out / "bundle.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.bundle"]


def killed_while_tracing(command, how) -> tuple[int, str]:
    """The exit code of an export that gets a signal while it traces, and what it says after that."""
    # whoever runs the tests in the background of a shell has SIGINT ignored, and children inherit that
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    assert process.stderr is not None
    while "tracing" not in process.stderr.readline():
        time.sleep(0.01)
    process.send_signal(how)
    _, errors = process.communicate()
    return process.returncode, errors


@pytest.mark.usefixtures("only_the_step_graph")
def test_a_killed_export_leaves_nothing_and_the_next_one_tidies_up(tiny_pipeline, tmp_path):
    out = tmp_path / "out.bundle"
    command = [sys.executable, "-m", "ddit.exporter.cli", "flux", "--model", tiny_pipeline, *FAST, "--out", out]
    for how in (signal.SIGINT, signal.SIGKILL):
        for _ in range(3):
            code, errors = killed_while_tracing(command, how)
            if code != 0:
                break
            shutil.rmtree(out)  # Python drops an interrupt that falls into a finalizer
        assert code != 0
        assert "Traceback" not in errors
        assert not out.exists()
        assert bool(list(tmp_path.iterdir())) == (how == signal.SIGKILL)
    assert run(main, "flux", "--model", tiny_pipeline, *FAST, "--out", out).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out.bundle"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(tiny_pipeline, tiny_adapter, tmp_path, dtype):
    out = tmp_path / "half.bundle"
    options = ("--levels", "2,4", "--adapter", tiny_adapter, "--profile", "256", "--out", out)
    asked = () if dtype == "fp16" else ("--dtype", dtype)  # fp16 is the default
    result = run(main, "flux", "--model", tiny_pipeline, *options, *asked)
    assert result.exit_code == 0, result.stderr
    assert ("bfloat16's rounding outweighs" in result.stderr) == (dtype == "bf16")
    bundle = Bundle.open(out)
    assert bundle.manifest.dtype == dtype
    checked = {entry.graph: entry.checked for entry in bundle.manifest.parity}
    if dtype == "bf16":  # a CPU has no kernels for it
        assert checked["level-4"].startswith("in float32 with 1 block")
        assert checked["step"] == "full"
        # what the original gives lies ready for a machine that can run the graph
        assert "level-4/1/output/velocity" in load_file(out / "parity.safetensors")
    else:
        assert set(checked.values()) == {"full"}
    tensors = load_file(out / "transformer.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {
        getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[dtype])
    }


def test_the_trunk_is_stored_once_and_graphs_are_small(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest
    for patch in (2, 4, 8):
        weights = manifest.graphs[f"level-{patch}"].weights
        assert "transformer.safetensors" in weights
        assert (f"level-{patch}.safetensors" in weights) == (patch != 2)
        assert manifest.files[f"level-{patch}.onnx"].size < 200_000
    trunk = load_file(tiny_bundle / "transformer.safetensors")
    own = load_file(tiny_bundle / "level-4.safetensors")
    assert not {name.removesuffix(".T") for name in trunk} & {name.removesuffix(".T") for name in own}


def test_exporting_twice_gives_the_same_files(tiny_bundle, tiny_pipeline, tiny_adapter, tmp_path):
    out = tmp_path / "again.bundle"
    options = ("--levels", "2,4,8", "--adapter", tiny_adapter, "--dtype", "fp32", "--profile", "256", "--out", out)
    assert run(main, "flux", "--model", tiny_pipeline, *options).exit_code == 0
    first, second = Bundle.open(tiny_bundle).manifest, Bundle.open(out).manifest
    different = {name for name in first.files if first.files[name].sha256 != second.files[name].sha256}
    assert different <= {"parity.safetensors"}


@pytest.mark.parametrize(("levels", "kept"), [("2,4", True), ("2,8", False)])
def test_a_model_s_own_schedule_lands_in_the_bundle(only_the_step_graph, tiny_pipeline, tmp_path, levels, kept):
    """Its smooth curve too, unless it says nothing of a level: a τ that is relative to it would mean something else."""
    smooth = [{"sigma": 0.9, "statistic": {"4": 2.0}}, {"sigma": 0.1, "statistic": {"4": 1.0}}]
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    (model / "ddit.json").write_text(json.dumps({"tau": 3.0, "warmup": 8, "smooth": smooth}))
    result = run(main, "flux", "--model", model, *FAST[2:], "--levels", levels, "--out", tmp_path / "a.bundle")
    assert result.exit_code == 0, result.stderr
    schedule = json.loads((tmp_path / "a.bundle" / "bundle.json").read_text())["schedule"]
    assert (schedule["tau"], len(schedule["smooth"])) == ((3.0, 2) if kept else (0.001, 0))
    assert schedule["warmup"] == 8


@pytest.mark.parametrize(("levels", "size"), [((2, 4, 6), (96, 192)), ((2, 6), (96, 144))])
def test_levels_that_do_not_divide_each_other(tiny_pipeline, tmp_path, levels, size):
    """Sizes are then multiples of the patches' least common multiple, 12 latent pixels for 4 and 6."""
    adapter = save_tiny_adapter(tmp_path / "a.safetensors", tiny_pipeline, levels[1:])
    out = tmp_path / "odd.bundle"
    options = ("--levels", ",".join(map(str, levels)), "--adapter", adapter, *FAST[2:], "--out", out)
    result = run(main, "flux", "--model", tiny_pipeline, *options)
    assert result.exit_code == 0, result.stderr
    pipeline = Pipeline.open(out, backend="cpu")
    order = (2, *levels)
    schedule = "fixed:" + ",".join(f"{patch}x1" for patch in order)
    result = pipeline("a red circle", schedule=schedule, height=size[0], width=size[1])
    assert result.image.size == size[::-1]
    assert np.isfinite(result.latent).all()
    assert [step.level for step in result.trace.steps] == list(order)


@pytest.mark.parametrize(
    ("component", "setting", "words"),
    [
        ("transformer", {"in_channels": 12}, "does not fit the vae: its in_channels is 12 instead of 16"),
        ("text_encoder", {"hidden_size": 24}, "does not fit the text_encoder: its pooled_projection_dim is 20"),
        ("transformer", {"axes_dims_rope": None}, "has no 'axes_dims_rope'"),
    ],
)
def test_parts_of_other_models_are_refused_before_the_export(tiny_pipeline, tmp_path, component, setting, words):
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    path = model / component / "config.json"
    config = {**json.loads(path.read_text()), **setting}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    result = run(main, "flux", "--model", model, "--levels", "2,4", "--profile", "256", "--out", tmp_path / "a.bundle")
    assert result.exit_code == 1
    assert words in result.stderr
    assert len([line for line in result.stderr.splitlines() if not line.startswith("warning")]) == 1


def test_defaults_of_a_model_that_no_manifest_may_have(tiny_pipeline, tmp_path):
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    (model / "ddit.json").write_text('{"tau": -1}')
    result = run(main, "flux", "--model", model, "--out", tmp_path / "a.bundle")
    assert result.exit_code == 1
    assert "ddit.json is not valid: tau" in result.stderr
