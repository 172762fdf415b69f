"""TensorRT from C++, on an emulated one of three releases: the engines that Python built, and the CPU's pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import run
from cpp.conftest import PROMPT, SEED, SOURCE, TENSORRT, Run, link_host, runner, write_inputs
from ddit.exporter.cli import main as export
from ddit.runtime import Pipeline
from fake_cuda import FakeCuda
from fake_tensorrt import FakeTensorRT

NEWEST = max(TENSORRT)
PROFILE = """
[[entry]]
height = [64, 64, 128]
width = [64, 128, 128]
text = [16, 16, 32]
batch = [1, 1, 2]
[[entry]]
height = [192, 192, 192]
width = [128, 128, 128]
text = [16, 16, 32]
batch = [1, 1, 1]
"""


def with_engines(source: Path, bundle: Path, version: str, profile: Path | None = None) -> Path:
    """A copy of a bundle with engines of every graph."""
    shutil.copytree(source, bundle)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(bundle.parent / "cache"))
        FakeTensorRT(version, FakeCuda("Fake GPU").install(patch)).install(patch)
        built = run(export, "engines", bundle, *(("--profile", profile) if profile else ()))
    assert built.exit_code == 0, built.stderr
    return bundle


@pytest.fixture(scope="module")
def bundle(rich_bundle, tensorrt_hosts, tmp_path_factory) -> Path:
    """With engines of two profiles for the newest release."""
    folder = tmp_path_factory.mktemp("newest")
    (folder / "two.toml").write_text(PROFILE)
    return with_engines(rich_bundle, folder / "a.bundle", TENSORRT[NEWEST], folder / "two.toml")


@pytest.fixture
def tensorrt_host(tensorrt_hosts) -> Run:
    return runner(tensorrt_hosts[NEWEST] / "ddit_host")


def check(
    host: Run, bundle: Path, folder: Path, schedule: str, height: int = 128, width: int = 64, frames: int | None = None
) -> None:
    """The host makes the CPU's picture or clip with the same decisions."""
    expected = Pipeline.open(bundle, backend="cpu")(
        PROMPT, seed=SEED, steps=12, schedule=schedule, height=height, width=width, frames=frames
    )
    outputs = ("--out", folder / "%d.png", "--latent-out", folder / "o.npy", "--trace", folder / "o.json")
    inputs = write_inputs(bundle, folder, height, width, frames)
    done = host(bundle, *inputs, *outputs, "--steps", 12, "--schedule", schedule, "--provider", "tensorrt")
    assert done.returncode == 0, done.stderr
    levels = [step["level"] for step in json.loads((folder / "o.json").read_text())["steps"]]
    assert levels == expected.trace.levels
    # nearly: the engines' weights have the LoRA merged into them
    np.testing.assert_allclose(np.load(folder / "o.npy")[0], expected.latent, atol=1e-3)


@pytest.mark.parametrize("number", TENSORRT)
def test_every_release_makes_the_picture(tensorrt_hosts, opset17_bundle, tmp_path, number):
    bundle = with_engines(opset17_bundle, tmp_path / "a.bundle", TENSORRT[number])
    check(runner(tensorrt_hosts[number] / "ddit_host"), bundle, tmp_path, "fixed:2x6,4x6")


@pytest.mark.parametrize(
    "schedule", ["native", "dynamic:tau=0.35,warmup=3,hold=2,absolute=1", "adaptive", "teacache:0.4"]
)
def test_every_kind_of_schedule(tensorrt_host, bundle, tmp_path, schedule):
    check(tensorrt_host, bundle, tmp_path, schedule)


def test_a_latent_grows_and_every_profile_serves_its_sizes(tensorrt_host, bundle, tmp_path):
    check(tensorrt_host, bundle, tmp_path, "progressive+adaptive:0.2", 128, 128)
    check(tensorrt_host, bundle, tmp_path, "native", 192, 128)


def test_a_clip(tensorrt_host, wan_bundle, tmp_path):
    bundle = with_engines(wan_bundle, tmp_path / "a.bundle", TENSORRT[NEWEST])
    check(tensorrt_host, bundle, tmp_path, "dynamic:tau=1,hold=2+adaptive:0.5", 64, 64, 9)


def refused(host: Run, bundle: Path, folder: Path, *options: object, size: tuple[int, int] = (128, 64)) -> str:
    """The one line of an error."""
    inputs = write_inputs(bundle, folder, *size)
    done = host(bundle, *inputs, "--out", folder / "o.png", "--steps", 2, "--provider", "tensorrt", *options)
    assert done.returncode in (1, 2), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (folder / "o.png").exists()
    return done.stderr


def test_a_size_without_an_engine(tensorrt_host, bundle, tmp_path):
    line = refused(tensorrt_host, bundle, tmp_path, size=(192, 64))
    assert line.startswith("error: height 192, width 64, text 16 is outside what the TensorRT engine of ")
    assert f"build another: ddit-export engines {bundle} --profile PROFILE" in line


def test_a_smaller_start_without_an_engine(tensorrt_host, rich_bundle, tmp_path):
    (tmp_path / "one.toml").write_text(PROFILE.split("[[entry]]")[2].join(("[[entry]]", "")))
    bundle = with_engines(rich_bundle, tmp_path / "a.bundle", TENSORRT[NEWEST], tmp_path / "one.toml")
    line = refused(tensorrt_host, bundle, tmp_path, "--schedule", "progressive:delta=0.5", size=(192, 128))
    assert "is outside what the TensorRT engine of" in line


def test_engines_that_are_missing_or_of_another_machine_or_graph(tensorrt_host, bundle, rich_bundle, tmp_path):
    assert "has no TensorRT engine of " in refused(tensorrt_host, rich_bundle, tmp_path)
    copy = tmp_path / "a.bundle"
    shutil.copytree(bundle, copy)
    infos = {json.loads(path.read_text())["graph"]: path for path in copy.glob("engines/*/engine.json")}
    for field, value, message in (
        ("target", {"tensorrt": "10.9.0.34", "gpu": "Fake GPU", "compute_capability": "9.0"}, "was built for another"),
        ("target", {"tensorrt": "11.4.0.106", "gpu": "Other", "compute_capability": "9.0"}, "was built for another"),
        ("content", "0" * 64, "was built from another version of the graph"),
        ("graph", "level-3", "has no TensorRT engine of level-4 yet"),
        ("file", "../engine.plan", "has no TensorRT engine of level-4 yet"),
        ("profile", {"entry": [{"height": "all"}]}, "has no TensorRT engine of level-4 yet"),
        ("size", 1, "is damaged: it has another size than recorded"),
    ):
        before = infos["level-4"].read_text()
        infos["level-4"].write_text(json.dumps({**json.loads(before), "built_for": "another", field: value}))
        line = refused(tensorrt_host, copy, tmp_path)
        assert message in line
        assert f"run: ddit-export engines {copy}" in line
        infos["level-4"].write_text(before)
    infos["level-4"].write_text("[" * 100_000)
    assert "has no TensorRT engine of level-4 yet" in refused(tensorrt_host, copy, tmp_path)


def test_an_engine_that_tensorrt_refuses(tensorrt_host, bundle, tmp_path):
    copy = tmp_path / "a.bundle"
    shutil.copytree(bundle, copy)
    (plan,) = (path.parent / "engine.plan" for path in copy.glob("engines/*/engine.json")
               if json.loads(path.read_text())["graph"] == "level-2")  # fmt: skip
    plan.write_bytes(b"x" * plan.stat().st_size)
    line = refused(tensorrt_host, copy, tmp_path)
    assert f"TensorRT could not load {plan}: the serialized engine is not valid; run: ddit-export engines" in line


def test_too_little_memory_or_no_such_gpu(tensorrt_hosts, bundle, tmp_path):
    host = runner(tensorrt_hosts[NEWEST] / "ddit_host", EMULATED_GPU_BYTES="20000")
    assert "the GPU's memory is too small: " in refused(host, bundle, tmp_path)
    assert "there is no GPU 3; there are 1" in refused(host, bundle, tmp_path, "--device", 3)


def test_cuda_s_own_library_finds_no_gpu(tensorrt_hosts, cuda, bundle, tmp_path):
    """The real one, which is asked before TensorRT."""
    host = runner(tensorrt_hosts[NEWEST] / "ddit_host", LD_LIBRARY_PATH=str(cuda / "lib"))
    assert refused(host, bundle, tmp_path).startswith("error: there is no GPU to run on: ")


def test_a_host_without_tensorrt_says_so(release, sdk, bundle, tmp_path):
    includes = ("-I", SOURCE / "include", "-I", SOURCE / "src")
    link_host(tmp_path, sdk, "-std=c++17", *includes, SOURCE / "app" / "main.cpp", release / "libddit.a")
    host = runner(tmp_path / "ddit_host")
    assert "this ddit_host was built without TensorRT" in refused(host, bundle, tmp_path)
