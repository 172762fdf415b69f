"""TaylorSeer, beside a plain transcription of the authors' recursion."""

from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import run
from ddit.runtime import Pipeline
from ddit.runtime.cli import main
from ddit.runtime.policies import Decision, Native, Reusing, RunHistory, TaylorSeer
from ddit.runtime.policies.prediction import taylor_weights

STEPS = 30
SIGMAS = np.linspace(1, 0, STEPS + 1)


def transcription(field: np.ndarray, interval: int, order: int, first: int) -> tuple[list[int], np.ndarray]:
    """The computed steps and every step's velocity, with the factors of the last computed step as the paper has them.

    A step is computed at first, and when ``interval`` - 1 have been predicted. Its factors are the velocity and the
    differences to the factors before, each divided by the distance.
    """
    computed: list[int] = []
    factors: list[np.ndarray] = []
    used, counter = [], 0
    for k in range(STEPS):
        if k < first or counter == interval - 1:
            new = [field[k]]
            for i in range(min(order, len(factors))):
                new.append((new[i] - factors[i]) / (k - computed[-1]))
            factors, counter = new, 0
            computed.append(k)
        else:
            counter += 1
        used.append(sum(f * (k - computed[-1]) ** i / factorial(i) for i, f in enumerate(factors)))
    return computed, np.array(used)


def follow(field: np.ndarray, reuse: TaylorSeer) -> tuple[list[int], np.ndarray]:
    """The same as a session does it."""
    policy, history = Reusing(Native(2), reuse), RunHistory(SIGMAS)
    kept, used = [], []
    for k in range(STEPS):
        decision = policy.decide(history)
        guess = sum((w * v for w, v in zip(decision.prediction, kept, strict=False)), start=np.zeros_like(field[0]))
        used.append(guess if decision.level is None else field[k])
        if decision.level is not None:
            kept = [field[k], *kept[:2]]
        history.record(decision, used[-1] - guess, {})
    return history.computed, np.array(used)


@given(st.integers(0, 99), st.integers(1, 7), st.integers(0, 2), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_steps_and_velocities_are_those_of_the_recursion(seed, interval, order, first):
    field = np.random.default_rng(seed).standard_normal((STEPS, 4))
    steps, used = follow(field, TaylorSeer(interval, order, first))
    expected_steps, expected = transcription(field, interval, order, first)
    assert steps == expected_steps
    np.testing.assert_allclose(used, expected, atol=1e-9)


def test_the_defaults_compute_the_first_steps_and_every_fourth():
    steps, _ = follow(np.zeros((STEPS, 1)), TaylorSeer())
    assert steps == [0, 1, 2, 6, 10, 14, 18, 22, 26]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_equal_distances_give_the_paper_s_equation(order):
    n, k = 4, 3
    values = np.random.default_rng(0).standard_normal(3)  # the newest first
    differences = [values[0], values[0] - values[1], values[0] - 2 * values[1] + values[2]]
    expected = sum(differences[i] / (factorial(i) * n**i) * k**i for i in range(order + 1))
    weights = taylor_weights([20, 16, 12], 20 + k, order)
    assert np.dot(weights, values[: order + 1]) == pytest.approx(expected)


def test_another_level_s_velocities_are_not_expanded():
    history = RunHistory(SIGMAS)
    for level in (2, 2, 2, 4):
        history.record(Decision(level), np.zeros((2, 2), np.float32), {})
    assert TaylorSeer().predict(history).weights == (1.0,)
    history.record(Decision(4), np.zeros((2, 2), np.float32), {})
    assert TaylorSeer().predict(history).weights == (2.0, -1.0)


@pytest.mark.parametrize("levels", ["native", "fixed:2x5,8x7"])
def test_where_every_step_is_computed_the_picture_is_the_same_to_the_bit(tiny_bundle, levels):
    pipeline, size = Pipeline.open(tiny_bundle, backend="cpu"), {"steps": 12, "height": 64, "width": 64}
    plain = pipeline("a red circle", schedule=levels, **size)
    same = pipeline("a red circle", schedule=f"{levels}+taylorseer:interval=1", **size)
    assert same.trace.levels == plain.trace.levels
    np.testing.assert_array_equal(same.latent, plain.latent)


def test_generate_reuses(tiny_bundle, tmp_path):
    options = ("--steps", 12, "--height", 64, "--width", 64, "--out", tmp_path / "out.png")
    result = run(
        main, "generate", tiny_bundle, "a red circle", "--schedule", "native", "--reuse", "taylorseer:4", *options
    )
    assert result.exit_code == 0, result.stderr
    assert "5 at level 2 + 7 predicted" in result.stderr
    result = run(main, "generate", tiny_bundle, "a red circle", "--reuse", "taylorseer:0", *options)
    assert result.exit_code == 2
    assert "write taylorseer:interval=4" in result.stderr
