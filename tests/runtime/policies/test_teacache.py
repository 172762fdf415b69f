"""TeaCache, beside a plain transcription of the authors' loop."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import run
from ddit.runtime import Bundle, Pipeline, Request
from ddit.runtime.cli import main
from ddit.runtime.errors import UsageError
from ddit.runtime.policies import Change, Native, Reusing, RunHistory, TeaCache

FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
WAN = (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774)
STEPS = 40
SIZE = {"steps": 12, "height": 64, "width": 64}


def transcription(changes: np.ndarray, coefficients: tuple[float, ...], threshold: float) -> list[int]:
    """The computed steps: one number is accumulated, and set back where a step is computed."""
    rescale, accumulated, computed = np.poly1d(coefficients), 0.0, []
    for count, change in enumerate(changes):
        if count in (0, len(changes) - 1):
            should_compute = True
        else:
            accumulated += rescale(change)
            should_compute = not accumulated < threshold
        if should_compute:
            accumulated = 0.0
            computed.append(count)
    return computed


def follow(changes: np.ndarray, reuse: TeaCache) -> list[int]:
    """The same as a session does it."""
    policy, history = Reusing(Native(2), reuse), RunHistory(np.linspace(1, 0, len(changes) + 1))
    for change in changes:
        history.changes.append(Change(float(change), 0.0, 0.0))
        decision = policy.decide(history)
        assert decision.level is not None or decision.prediction == (1.0,)
        history.record(decision, np.zeros((2, 2), np.float32), {})
    return history.computed


@given(
    changes=st.lists(st.floats(0, 0.3), min_size=2, max_size=STEPS),
    coefficients=st.sampled_from([FLUX, WAN, (1.0, 0.0)]),
    threshold=st.floats(0.01, 2),
)
@settings(deadline=None, max_examples=100)
def test_computed_steps_are_those_of_the_paper(changes, coefficients, threshold):
    values = np.array(changes)
    assert follow(values, TeaCache(coefficients, threshold)) == transcription(values, coefficients, threshold)


def test_a_polynomial_below_0_reuses_nothing_at_threshold_0():
    assert follow(np.full(10, 0.1), TeaCache((-1.0, 0.0), 0.0)) == [*range(10)]


@pytest.fixture(scope="module")
def pipeline(tiny_bundle) -> Pipeline:
    return Pipeline.open(tiny_bundle, backend="cpu")


def test_recorded_changes_give_the_paper_s_decisions(pipeline):
    """A run whose changes were recorded, with the published coefficients that its bundle has."""
    coefficients = pipeline.bundle.manifest.gate.coefficients
    assert coefficients == FLUX
    every = pipeline("a red circle", schedule="teacache:0", **SIZE).trace
    assert every.predicted == 0
    for threshold in (0.3, 0.5, 0.9):
        trace = pipeline("a red circle", schedule=f"teacache:{threshold}", **SIZE).trace
        changes = [1.0] + [step.figures["change"] for step in trace.steps[1:]]
        computed = [step.step for step in trace.steps if step.level is not None]
        assert computed == transcription(np.array(changes), coefficients, threshold)
        assert 2 < len(computed) < 12


@pytest.mark.parametrize("levels", ["native", "fixed:2x5,8x7", "dynamic:tau=2"])
def test_at_threshold_0_the_picture_is_the_same_to_the_bit(pipeline, levels):
    plain = pipeline("a red circle", schedule=levels, **SIZE)
    same = pipeline("a red circle", schedule=f"{levels}+teacache:threshold=0", **SIZE)
    assert same.trace.levels == plain.trace.levels
    np.testing.assert_array_equal(same.latent, plain.latent)


def test_the_change_is_that_of_the_latent_s_own_steps(pipeline):
    """Sent through the gate graph one after another, the latents of a run change as its session said."""
    seen = []
    trace = pipeline(
        "a red circle", schedule="teacache:0.5", **SIZE, on_step=lambda progress: seen.append(progress.latents()[0])
    ).trace
    manifest = pipeline.bundle.manifest
    engine = pipeline.backend.engine(manifest.gate.graph)
    sigmas = pipeline.sigmas(12, 64, 64)
    pooled = pipeline.encode(["a red circle"])["pooled"]
    before = None
    for step, latent in enumerate(seen[:-1], start=1):
        inputs = {"latent": latent[None], "timestep": sigmas[step : step + 1], "pooled": pooled}
        inputs["guidance"] = np.array([manifest.guidance.default], np.float32)
        zeros = np.zeros((1, *(side // 2 for side in latent.shape[1:]), 32), np.float32)
        found = engine.run({**inputs, "gate_input": zeros if before is None else before})
        if before is not None:
            assert found["gate_change"][0] == pytest.approx(trace.steps[step].figures["change"], rel=1e-4)
        before = found["next_gate_input"]


def test_samples_with_and_without_a_gate_step_beside_each_other(pipeline):
    schedules = ["teacache:0.4", "native", "fixed:2x4,8x8+teacache:0.9", "taylorseer:3", "teacache:0.9"]
    requests = [Request("a red circle", seed, 12, text, 64, 64) for seed, text in enumerate(schedules)]
    results = pipeline.run(requests)
    for request, result in zip(requests, results, strict=True):
        (alone,) = pipeline.run([request])
        assert result.trace.levels == alone.trace.levels
        np.testing.assert_allclose(result.latent, alone.latent, atol=1e-5 * np.abs(alone.latent).max())


def test_without_a_gate_it_is_refused(tiny_bundle, tmp_path):
    folder = tmp_path / "a.bundle"
    shutil.copytree(tiny_bundle, folder)
    manifest = json.loads((folder / "bundle.json").read_text())
    del manifest["gate"]
    (folder / "bundle.json").write_text(json.dumps(manifest))
    result = run(main, "generate", folder, "a red circle", "--reuse", "teacache:0.4", "--out", tmp_path / "o.png")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "teacache needs a gate graph, which the bundle lacks" in result.stderr
    bundle = Bundle.open(folder)
    with pytest.raises(UsageError, match="needs a gate graph"):
        Request("a red circle", schedule=Reusing(Native(2), TeaCache(FLUX))).resolve(bundle.manifest, "cpu")


def test_generate_reuses(tiny_bundle, tmp_path):
    options = (
        "--steps",
        12,
        "--height",
        64,
        "--width",
        64,
        "--out",
        tmp_path / "o.png",
        "--trace",
        tmp_path / "t.json",
    )
    result = run(main, "generate", tiny_bundle, "a red circle", "--schedule", "dynamic+teacache:0.4", *options)
    assert result.exit_code == 0, result.stderr
    schedule = json.loads((tmp_path / "t.json").read_text())["schedule"]
    assert schedule["text"].endswith("+teacache:threshold=0.4")
    assert schedule["reuse"]["coefficients"] == list(FLUX)
    same = run(main, "generate", tiny_bundle, "a red circle", "--reuse", "teacache:0.4", *options)
    assert same.stderr.split(" in ")[0] == result.stderr.split(" in ")[0]
