"""Prediction with error control, beside a plain transcription of its equations on a path that is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import Polynomial

from ddit.runtime.policies import Adaptive, Decision, Native, Reusing, RunHistory
from ddit.runtime.policies.prediction import lagrange_weights

STEPS = 50
SIGMAS = np.linspace(1, 0, STEPS + 1) ** 1.3


def velocities(seed: int) -> np.ndarray:
    """A smooth vector (STEPS, 8) over σ."""
    rng = np.random.default_rng(seed)
    phase, speed = rng.uniform(0, 6, 8), rng.uniform(0.5, 4, 8)
    return np.sin(SIGMAS[:-1, None] * speed + phase)


def transcription(field: np.ndarray, tolerance: float, order: int) -> tuple[list[int], np.ndarray]:
    """The computed steps and where the path ends, with polynomials fitted value by value."""
    computed: list[int] = []
    kept: list[np.ndarray] = []
    place, difference = np.zeros(field.shape[1]), None
    for k in range(STEPS):
        nodes = computed[-order - 1 :]
        fits = (
            [Polynomial.fit(SIGMAS[nodes], column, order) for column in np.array(kept[-order - 1 :]).T] if kept else []
        )
        guess = np.array([fit(SIGMAS[k]) for fit in fits]) if len(nodes) > order else None
        compute = True
        if guess is not None and difference is not None:
            since = range(computed[-1] + 1, k + 1)
            moved = sum(abs((SIGMAS[j + 1] - SIGMAS[j]) * np.prod(SIGMAS[j] - SIGMAS[nodes])) for j in since)
            expected = np.sqrt((difference**2).mean()) * moved
            expected = expected / (1 - SIGMAS[k + 1])
            compute = expected >= tolerance or 1 - SIGMAS[k + 1] > 1.6 * (1 - SIGMAS[computed[-1]])
        v = field[k] if compute else guess
        if compute:
            if guess is not None:
                # the fit through one point more, less the fit, over the steps since
                points = [*nodes, k]
                higher = [
                    Polynomial.fit(SIGMAS[points], column, order + 1) for column in np.array([*kept[-order - 1 :], v]).T
                ]
                for j in range(computed[-1] + 1, k):
                    better = np.array([fit(SIGMAS[j]) for fit in higher]) - [fit(SIGMAS[j]) for fit in fits]
                    place = place + (SIGMAS[j + 1] - SIGMAS[j]) * better
                difference = (v - guess) / np.prod(SIGMAS[k] - SIGMAS[nodes])
            computed.append(k)
            kept.append(v)
        place = place + (SIGMAS[k + 1] - SIGMAS[k]) * v
    return computed, place


def follow(field: np.ndarray, reuse: Adaptive) -> tuple[list[int], np.ndarray]:
    """The same as a session does it."""
    policy, history = Reusing(Native(2), reuse), RunHistory(SIGMAS)
    kept: list[np.ndarray] = []
    place = np.zeros(field.shape[1])
    for k in range(STEPS):
        decision = policy.decide(history)
        guess = sum((w * v for w, v in zip(decision.prediction, kept, strict=False)), start=np.zeros_like(place))
        v = guess if decision.level is None else field[k]
        place = place + decision.correction * (v - guess) + (SIGMAS[k + 1] - SIGMAS[k]) * v
        if decision.level is not None:
            kept = [v, *kept[:2]]
        history.record(decision, v - guess, {})
    return history.computed, place


@given(st.integers(0, 99), st.floats(1e-5, 0.3), st.integers(0, 2))
@settings(deadline=None, max_examples=40)
def test_decisions_and_path_are_those_of_the_equations(seed, tolerance, order):
    field = velocities(seed)
    steps, place = follow(field, Adaptive(tolerance, order))
    expected_steps, expected_place = transcription(field, tolerance, order)
    assert steps == expected_steps
    np.testing.assert_allclose(place, expected_place, atol=1e-6)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_polynomial_path_is_followed_exactly(order):
    """Of the order of the prediction."""
    field = np.stack([SIGMAS[:-1] ** power for power in range(order + 1)], axis=1)
    steps, place = follow(field, Adaptive(0.5, order))
    assert len(steps) < 20
    np.testing.assert_allclose(place, (np.diff(SIGMAS)[:, None] * field).sum(axis=0), atol=1e-9)


def test_a_smaller_tolerance_computes_more_and_ends_nearer():
    field = velocities(3)
    exact = (np.diff(SIGMAS)[:, None] * field).sum(axis=0)
    found = [follow(field, Adaptive(tolerance)) for tolerance in (0.1, 0.01, 0.001, 0.0)]
    counts = [len(steps) for steps, _ in found]
    errors = [float(np.abs(place - exact).max()) for _, place in found]
    assert counts == sorted(counts)
    assert counts[-1] == STEPS
    assert errors[0] > errors[1] > errors[2] > errors[3] == 0


def test_another_level_s_velocities_are_not_extrapolated():
    history = RunHistory(SIGMAS)
    for level in (2, 2, 2, 2, 4):
        history.record(Decision(level, prediction=(1.0,)), np.zeros((2, 2), np.float32), {})
    assert Adaptive(0.1).predict(history) is None
    history.record(Decision(4), np.zeros((2, 2), np.float32), {})
    assert not Adaptive(0.1).predict(history).enough, "no error of this level has been seen yet"


@given(st.lists(st.floats(0.1, 1), min_size=1, max_size=3, unique=True), st.floats(0, 1))
def test_the_weights_of_a_constant_add_up_to_one(nodes, sigma):
    if min(np.diff(sorted(nodes)), default=1) > 1e-3:
        assert sum(lagrange_weights(nodes, sigma)) == pytest.approx(1, abs=1e-6)
