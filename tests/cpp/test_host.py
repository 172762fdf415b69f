"""The C++ host beside the Python runtime: the same schedules, the same pictures, the same errors."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conformance_bundle import SIZES, STEPS
from cpp.conftest import PROMPT, SEED, write_inputs
from ddit.runtime import Pipeline
from ddit.runtime.errors import DditError

SCHEDULES = (
    "native",
    "fixed:8x3,4x3,2x6",
    "dynamic:tau=0.35,warmup=3,hold=2,absolute=1",
    "adaptive",
    "dynamic:tau=1",
    "dynamic:tau=1.2,hold=1,coarsest=4",
    "dynamic:tau=1,hold=2+adaptive:0.5",
    "adaptive:tolerance=0.3,order=2",
    "adams",
    "taylorseer:interval=3,order=2",
    "teacache:0.4",
    "spectralcache:0.6",
    "dpcache",
    "progressive+adaptive:0.2",
    "progressive:adaptive,delta=0.2+dynamic:tau=1",
)


@pytest.fixture(scope="module")
def bundle(rich_bundle) -> Path:
    return rich_bundle


@pytest.fixture(scope="module")
def pipeline(bundle) -> Pipeline:
    return Pipeline.open(bundle, backend="cpu")


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_same_schedule_and_picture(bundle, pipeline, host, tmp_path, size):
    height, width = size
    inputs = write_inputs(bundle, tmp_path, height, width)
    outputs = ("--out", tmp_path / "o.png", "--latent-out", tmp_path / "o.npy", "--trace", tmp_path / "o.json")
    ran = []
    for schedule in SCHEDULES:
        asked = {"seed": SEED, "steps": STEPS, "schedule": schedule, "height": height, "width": width}
        done = host(bundle, *inputs, *outputs, "--steps", STEPS, "--schedule", schedule)
        try:
            expected = pipeline(PROMPT, **asked)
        except DditError as error:
            refused = error.exit_code, f"error: {error}\n"
        else:
            refused = None
        if refused:
            assert (done.returncode, done.stderr) == refused
            continue
        assert done.returncode == 0, (schedule, done.stderr)
        ran.append(schedule)
        trace = json.loads((tmp_path / "o.json").read_text())
        assert trace["schedule"]["text"] == expected.trace.schedule["text"]
        assert [one["level"] for one in trace["steps"]] == expected.trace.levels, schedule
        for found, wanted in zip(trace["steps"], expected.trace.steps, strict=True):
            assert (found["step"], found["sigma"], found["by"]) == (wanted.step, wanted.sigma, wanted.by)
            assert (found["scale"], tuple(found["size"])) == (wanted.scale, wanted.size)
            assert (found["error"] is None) == (wanted.error is None)
            assert (found["error"] or 0.0) == pytest.approx(wanted.error or 0.0, rel=1e-4)
            assert found["figures"] == pytest.approx(wanted.figures, rel=1e-4)
            assert {int(p): v for p, v in found["statistic"].items()} == pytest.approx(wanted.statistic, rel=1e-4)
        np.testing.assert_allclose(np.load(tmp_path / "o.npy")[0], expected.latent, atol=1e-3)
        pixels = [np.asarray(image, dtype=int) for image in (Image.open(tmp_path / "o.png"), expected.image)]
        assert abs(pixels[0] - pixels[1]).max() <= 1, schedule
    assert len(ran) >= len(SCHEDULES) - 2  # progressive ones ask for a larger picture


def test_a_run_goes_on_from_a_latent(bundle, pipeline, host, tmp_path):
    inputs = write_inputs(bundle, tmp_path, 64, 64)
    seen = []
    whole = pipeline(PROMPT, seed=SEED, steps=6, schedule="native", height=64, width=64,
                     on_step=lambda progress: seen.append(progress.latents()[0]))  # fmt: skip
    np.save(tmp_path / "latent.npy", seen[2])
    options = ("--latent", tmp_path / "latent.npy", "--first-step", 3, "--steps", 6, "--schedule", "native")
    done = host(bundle, *inputs, *options, "--out", tmp_path / "o.png", "--latent-out", tmp_path / "o.npy")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "o.npy")[0], whole.latent, atol=1e-3)


def test_guidance_carry_and_text_length(bundle, pipeline, host, tmp_path):
    inputs = write_inputs(bundle, tmp_path, 64, 64)
    asked = {"guidance": 2.0, "carry": 0.9, "text_length": 24}
    options = ("--guidance", 2, "--carry", 0.9, "--text-length", 24, "--steps", 4, "--schedule", "fixed:2x2,8x2")
    done = host(bundle, *inputs, *options, "--out", tmp_path / "o.png", "--latent-out", tmp_path / "o.npy")
    assert done.returncode == 0, done.stderr
    expected = pipeline(PROMPT, seed=SEED, schedule="fixed:2x2,8x2", height=64, width=64, **asked)
    np.testing.assert_allclose(np.load(tmp_path / "o.npy")[0], expected.latent, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--schedule", "nonsense"), 2, "unknown schedule 'nonsense'"),
        (("--schedule", "fixed:3x4"), 2, "the schedule asks for level 3; the bundle has 2, 4, 8"),
        (("--schedule", "dynamic:warmup=1"), 2, "warmup must be at least 3"),
        (("--schedule", "native+fixed:2x4"), 2, "decides twice on the same thing"),
        (("--steps", "0"), 2, "the number of steps must be"),
        (("--height", "65"), 2, "height 65 is not a multiple of 64"),
        (("--height", "4096"), 2, "outside the bundle's profile"),
        (("--frames", "9"), 2, "this model makes pictures, which have no frames"),
        (("--negative-ids", "ids.json"), 2, "this model takes no negative prompt"),
        (("--carry", "2"), 2, "carry must lie between 0 and 1"),
        (("--first-step", "1"), 2, "needs the latent to go on from"),
        (("--latent", "ids.json"), 2, "is no .npy file"),
        (("--noise", "other.npy"), 2, "the noise has shape (1, 2, 3), the picture needs (4, 8, 8)"),
        (("--provider", "npu"), 2, "the provider is cpu, cuda or tensorrt"),
        (("--out", "missing/o.png"), 1, "missing/o.png cannot be written"),
        (("--what",), 2, "'--what' is not known"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(bundle, host, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    inputs = write_inputs(bundle, tmp_path, 64, 64)
    np.save(tmp_path / "other.npy", np.zeros((1, 2, 3), np.float32))
    done = host(bundle, *inputs, "--steps", 2, "--out", "o.png", *arguments)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("place", "kind"),
    [("sampler", "dpm_solver"), ("positions", "learned"), ("guidance", "perturbed"), ("decoder", "audio")],
)
def test_a_kind_that_it_does_not_know_is_refused(bundle, host, tmp_path, place, kind):
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest[place]["kind"] = kind
    other = tmp_path / "other.bundle"
    other.mkdir()
    (other / "bundle.json").write_text(json.dumps(manifest))
    done = host(other, *write_inputs(bundle, tmp_path, 64, 64), "--out", tmp_path / "o.png")
    assert done.returncode == 1
    assert "this host knows the " in done.stderr
    assert f"not '{kind}'" in done.stderr
