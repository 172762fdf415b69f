"""ddit-run calibrate: finding τ, keeping it, and using it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from conftest import run
from ddit.runtime import Bundle, Pipeline
from ddit.runtime.bundle.manifest import Costs
from ddit.runtime.cli import main as ddit_run
from ddit.runtime.shapes import Size
from ddit.runtime.tools import calibrate as calibrate_module
from ddit.runtime.tools.calibrate import ssim
from ddit.runtime.tools.plots import plot_schedule

PROMPTS = ["a red circle", "a blue square", "a green star", "a red star", "a blue circle", "a green square"]
SIZE = ("--steps", 12, "--height", 128, "--width", 64)


@pytest.fixture
def bundle(tiny_bundle, tmp_path, monkeypatch) -> Path:
    """A bundle to write to, whose levels cost what they would at a real size."""
    costs = Costs(levels={2: 4.0, 4: 1.5, 8: 1.0}, predicted=0.0, encode=1.0, decode=2.0)
    monkeypatch.setattr(calibrate_module, "measure_costs", lambda pipeline, size: costs)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return Path(shutil.copytree(tiny_bundle, tmp_path / "a.bundle"))


def calibrate(bundle: Path, *options: object, schedule: str = "dynamic"):
    prompts = ("--prompts", bundle.parent / "prompts.txt", "--schedule", schedule)
    return run(ddit_run, "calibrate", bundle, *prompts, *SIZE, *options)


def test_the_speed_up_asked_for_is_found_and_kept(bundle):
    result = calibrate(bundle, "--speedup", "1.5", "--plot", bundle.parent / "curve.png", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    chosen = min(report["curve"], key=lambda point: abs(point["value"] - report["tau"]))
    costs = [1 / sample["speedup"] for sample in chosen["samples"]]
    assert len(costs) / sum(costs) == pytest.approx(1.5, rel=0.1)
    fitted, held_out = ([sample["prompt"] for sample in point["samples"]] for point in (chosen, report["held_out"]))
    assert sorted(fitted + held_out) == sorted(PROMPTS)
    assert len(fitted) == len(held_out) == 3
    assert (bundle.parent / "curve.png").stat().st_size > 1000

    manifest = Bundle.open(bundle).manifest
    (kept,) = manifest.calibrations
    assert (kept.steps, kept.height, kept.width, kept.tau) == (12, 128, 64, report["tau"])
    pipeline = Pipeline.open(bundle, backend="cpu")
    same = pipeline("a red circle", steps=12, height=128, width=64, schedule="dynamic")
    assert same.trace.schedule["tau"] == kept.tau
    assert {len(curve) for curve in same.trace.schedule["smooth"].values()} == {12}
    assert json.loads(same.trace.to_json())["schedule"]["text"].startswith("dynamic:tau=")
    plot_schedule(same.trace, bundle.parent / "schedule.png")
    other = pipeline("a red circle", steps=11, height=128, width=64, schedule="dynamic")
    assert other.trace.schedule["tau"] == manifest.schedule.tau
    assert "dynamic calibrated for 12 steps at 128×64" in run(ddit_run, "inspect", bundle).stdout


def test_a_quality_is_kept_and_a_later_calibration_replaces_the_first(bundle):
    assert calibrate(bundle, "--speedup", "1.4").exit_code == 0
    result = calibrate(bundle, "--quality", "0.9", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    (chosen,) = (point for point in report["curve"] if point["value"] == report["tau"])
    assert np.mean([sample["similarity"] for sample in chosen["samples"]]) >= 0.9
    (kept,) = Bundle.open(bundle).manifest.calibrations
    assert kept.tau == report["tau"]


def test_a_tolerance_is_found_kept_and_used(bundle):
    """Of twelve steps few can be predicted: in the first ones the picture's share of the latent grows too fast."""
    assert (
        calibrate(bundle, "--speedup", "1.3", "--plot", bundle.parent / "curve.png", schedule="adaptive").exit_code == 0
    )
    assert calibrate(bundle, "--speedup", "1.4").exit_code == 0  # of another kind: both are kept
    manifest = Bundle.open(bundle).manifest
    adaptive, dynamic = manifest.calibrations
    assert (adaptive.kind, dynamic.kind) == ("adaptive", "dynamic")
    assert all(sum(point.shares.values()) <= 1 for point in adaptive.curve)
    assert min(point.shares[2] for point in adaptive.curve) < 0.85
    pipeline = Pipeline.open(bundle, backend="cpu")
    result = pipeline("a red circle", steps=12, height=128, width=64)
    assert result.trace.schedule["reuse"]["tolerance"] == adaptive.tolerance
    assert result.trace.schedule["text"] == f"native+adaptive:tolerance={adaptive.tolerance:g},order=1"
    plot_schedule(result.trace, bundle.parent / "schedule.png")
    assert "adaptive calibrated for 12 steps at 128×64: tolerance" in run(ddit_run, "inspect", bundle).stdout


def test_a_policy_that_the_bundle_has_no_place_for_is_calibrated_all_the_same(bundle):
    result = calibrate(bundle, "--speedup", "2", "--json", schedule="fixed:2x3,4x9+adaptive")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["schedule"] == f"fixed:2x3,4x9+adaptive:tolerance={report['value']:g},order=1"
    assert not Bundle.open(bundle).manifest.calibrations


def test_a_policy_without_a_number_is_refused(bundle):
    result = calibrate(bundle, schedule="native")
    assert result.exit_code == 2
    assert "native has no number to calibrate" in result.stderr


def test_every_backend_has_a_calibration_of_its_own(bundle):
    assert calibrate(bundle, "--backend", "cpu").exit_code == 0
    assert calibrate(bundle, "--backend", "CPUExecutionProvider", "--quality", "0.99").exit_code == 0
    first, second = Bundle.open(bundle).manifest.calibrations
    assert first.tau != second.tau
    size = {"steps": 12, "height": 128, "width": 64}
    for name, tau in (("cpu", first.tau), ("CPUExecutionProvider", second.tau)):
        assert Pipeline.open(bundle, backend=name).policy("dynamic", **size).tau == tau
    manifest = Bundle.open(bundle).manifest
    run = {"steps": 12, "size": Size(128, 64)}
    assert manifest.calibration("dynamic", **run, backend="tensorrt on another GPU") == second
    assert manifest.calibration("dynamic", **run | {"steps": 11}, backend="cpu") is None


def test_an_absolute_tau_is_of_no_smooth_pictures(bundle):
    assert calibrate(bundle, "--speedup", "1.4", "--absolute").exit_code == 0
    (kept,) = Bundle.open(bundle).manifest.calibrations
    assert kept.smooth == ()
    schedule = Pipeline.open(bundle, backend="cpu").policy("dynamic", steps=12, height=128, width=64)
    assert schedule.smooth is None


def test_smooth_pictures_are_those_of_the_prompts(bundle):
    assert calibrate(bundle, "--speedup", "1.4").exit_code == 0
    (kept,) = Bundle.open(bundle).manifest.calibrations
    assert len(kept.smooth) == 10  # of twelve steps, two have no third difference yet
    assert all(set(point.statistic) == {4, 8} for point in kept.smooth)
    schedule = Pipeline.open(bundle, backend="cpu").policy("dynamic", steps=12, height=128, width=64)
    assert schedule.threshold(4, 11) == pytest.approx(kept.tau * schedule.smooth[4][11])


def test_a_dry_run_keeps_nothing(bundle):
    before = (bundle / "bundle.json").read_bytes()
    assert calibrate(bundle, "--speedup", "1.5", "--dry-run").exit_code == 0
    assert (bundle / "bundle.json").read_bytes() == before


def test_a_bundle_that_cannot_be_written_is_refused_before_the_work(bundle, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("ddit.runtime.files.NamedTemporaryFile", refuse)
    result = calibrate(bundle)
    assert result.exit_code == 2
    assert result.stderr.strip() == f"error: {bundle / 'bundle.json'} cannot be written: Read-only file system"


def test_a_bundle_that_is_exported_again_meanwhile_keeps_no_calibration(bundle, monkeypatch):
    def export_again(*arguments, **options):
        manifest = json.loads((bundle / "bundle.json").read_text())
        manifest["files"]["step.onnx"]["sha256"] = "0" * 64
        (bundle / "bundle.json").write_text(json.dumps(manifest))
        return calibration(*arguments, **options)

    calibration = calibrate_module.calibration
    monkeypatch.setattr(calibrate_module, "calibration", export_again)
    result = calibrate(bundle, "--speedup", "1.4")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith("was exported again while it was open; open it anew")
    assert not json.loads((bundle / "bundle.json").read_text())["calibrations"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--speedup", "9"), "a speed-up of 9 cannot be reached with 12 steps; dynamic:tau="),
        (("--speedup", "2", "--quality", "0.9"), "give --speedup or --quality, not both"),
    ],
)
def test_what_cannot_be_had_is_said(bundle, options, words):
    before = (bundle / "bundle.json").read_bytes()
    result = calibrate(bundle, *options)
    assert result.exit_code == 2
    assert words in result.stderr.splitlines()[-1]
    assert (bundle / "bundle.json").read_bytes() == before


def test_one_prompt_is_too_few(bundle):
    (bundle.parent / "prompts.txt").write_text("a red circle\n\n")
    result = calibrate(bundle)
    assert result.exit_code == 2
    assert "needs two prompts or more" in result.stderr


def test_similarity_is_scikit_image_s():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    other = np.clip(picture + rng.normal(0, 20, picture.shape), 0, 255).astype(np.uint8)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = structural_similarity(picture, other, data_range=255, channel_axis=2, **options)
    assert ssim(picture, other) == pytest.approx(expected, abs=1e-9)
    assert ssim(picture, picture) == 1.0
