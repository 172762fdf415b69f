"""SpectralCache, beside a plain transcription of the paper's algorithm 1."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import run
from ddit.runtime import Pipeline
from ddit.runtime.cli import main
from ddit.runtime.policies import Change, Native, Reusing, RunHistory, SpectralCache

FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
SIZE = {"steps": 16, "height": 64, "width": 64}


def transcription(changes, coefficients, tau, low, high, s_min, s_max, c_max) -> list[int]:
    """The computed steps, with the accumulated distance A and the counter c as the paper keeps them."""
    rescale, distance, count, computed = np.poly1d(coefficients), 0.0, 0, []
    steps = len(changes)
    for t, (whole, of_low, of_high) in enumerate(changes):
        distance += rescale(whole)
        effective = tau * (s_min + (s_max - s_min) * (1 - np.cos(2 * np.pi * t / steps)) / 2)
        bands = of_low <= effective * low and of_high <= effective * high
        if t not in (0, steps - 1) and count < c_max and distance < effective and bands:
            count += 1
        else:
            distance, count = 0.0, 0
            computed.append(t)
    return computed


def follow(changes, reuse: SpectralCache) -> list[int]:
    """The same as a session does it."""
    policy, history = Reusing(Native(2), reuse), RunHistory(np.linspace(1, 0, len(changes) + 1))
    for change in changes:
        history.changes.append(Change(*change))
        history.record(policy.decide(history), np.zeros((2, 2), np.float32), {})
    return history.computed


CHANGES = st.lists(st.tuples(*[st.floats(0.001, 0.5)] * 3), min_size=2, max_size=40)


@given(
    changes=CHANGES,
    threshold=st.floats(0.05, 3),
    scales=st.tuples(*[st.floats(0.1, 2)] * 4),
    longest=st.integers(0, 5),
)
@settings(deadline=None, max_examples=150)
def test_computed_steps_are_those_of_the_paper(changes, threshold, scales, longest):
    expected = transcription(changes, FLUX, threshold, *scales, longest)
    assert follow(changes, SpectralCache(FLUX, threshold, *scales, longest)) == expected


@pytest.mark.parametrize(
    ("change", "threshold"),
    [((0.05, 0.9, 0.0), 1.0), ((0.05, 0.0, 1.6), 1.0)],
)
def test_each_band_alone_can_ask_for_a_step(change, threshold):
    """At s = 1 throughout: the first band may change by 0.8 of the threshold, the second by 1.5."""
    reuse = SpectralCache((0.0, 0.0), threshold, least=1.0, most=1.0, longest=9)
    assert follow([change] * 6, reuse) == [*range(6)]
    assert follow([(change[0], 0.7, 1.4)] * 6, reuse) == [0, 5]


def test_recorded_changes_give_the_paper_s_decisions(tiny_bundle):
    pipeline = Pipeline.open(tiny_bundle, backend="cpu")
    for threshold in (0.5, 1.0, 2.0):
        trace = pipeline("a red circle", schedule=f"spectralcache:{threshold}", **SIZE).trace
        seen = pipeline("a red circle", schedule=f"teacache:{threshold}", **SIZE).trace
        assert seen.steps[1].figures["change"] > 0
        computed = [step.step for step in trace.steps if step.level is not None]
        figures = [step.figures for step in trace.steps[1:]]
        # what was added up since the last computed step, taken apart again
        estimates = [
            now["accumulated"] - (before["accumulated"] if step - 1 not in computed else 0.0)
            for step, (before, now) in enumerate(zip([{}, *figures], figures, strict=False), start=1)
        ]
        changes = [(9.0, 9.0, 9.0), *((e, f["low"], f["high"]) for e, f in zip(estimates, figures, strict=True))]
        assert computed == transcription(changes, (1.0, 0.0), threshold, 0.8, 1.5, 0.5, 1.5, 2)
        assert 2 < len(computed) < 16


@pytest.mark.parametrize("levels", ["native", "fixed:2x5,8x11"])
def test_at_threshold_0_the_picture_is_the_same_to_the_bit(tiny_bundle, levels):
    pipeline = Pipeline.open(tiny_bundle, backend="cpu")
    plain = pipeline("a red circle", schedule=levels, **SIZE)
    same = pipeline("a red circle", schedule=f"{levels}+spectralcache:0", **SIZE)
    assert same.trace.levels == plain.trace.levels
    np.testing.assert_array_equal(same.latent, plain.latent)


def test_generate_reuses(tiny_bundle, tmp_path):
    options = ("--steps", 12, "--height", 64, "--width", 64, "--out", tmp_path / "o.png", "--schedule", "native")
    result = run(main, "generate", tiny_bundle, "a red circle", "--reuse", "spectralcache:1,longest=3", *options)
    assert result.exit_code == 0, result.stderr
    assert "predicted" in result.stderr
    for wrong in ("spectralcache:low=-1", "spectralcache:longest=-1", "spectralcache:threshold=nan"):
        result = run(main, "generate", tiny_bundle, "a red circle", "--reuse", wrong, *options)
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
        assert "write spectralcache:0.6" in result.stderr
