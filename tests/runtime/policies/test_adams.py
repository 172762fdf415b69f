"""Adams-Bashforth of order 2, against the solver of SciPy's kind of textbook: its order on a known equation."""

import itertools

import numpy as np
import pytest

from ddit.runtime import Pipeline
from ddit.runtime.policies import Native, Reusing, RunHistory
from ddit.runtime.policies.adams import Adams


def solve(steps: int) -> float:
    """dz/dσ = 2 z from σ = 1 to 0 on uneven steps, as a session moves it; the exact end is e⁻²."""
    sigmas = np.linspace(1, 0, steps + 1) ** 1.2
    policy, history, z, last = Reusing(Native(2), Adams()), RunHistory(sigmas), 1.0, 0.0
    for now, after in itertools.pairwise(sigmas):
        decision, v = policy.decide(history), 2 * z
        assert decision.level == 2
        guess = sum(decision.prediction) * last
        z += decision.correction * (v - guess) + (after - now) * v
        last = v
        history.record(decision, np.zeros((1, 1), np.float32), {})
    return z


def test_the_error_falls_with_the_square_of_the_step():
    errors = [abs(solve(steps) - np.exp(-2)) for steps in (40, 80, 160)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.15)


def test_a_run_is_that_of_the_formula(tiny_bundle):
    """z′ = z + h((1 + r/2) v − (r/2) v₁), from the velocities that the run itself shows."""
    pipeline = Pipeline.open(tiny_bundle, backend="cpu")
    latents = []
    pipeline("a red circle", schedule="adams", steps=6, height=64, width=64,
             on_step=lambda progress: latents.append(progress.latents()[0].astype(np.float64)))  # fmt: skip
    sigmas = pipeline.sigmas(6, 64, 64).astype(np.float64)
    run = pipeline("a red circle", schedule="native", steps=6, height=64, width=64, latent=None)
    assert np.abs(run.latent - latents[-1]).max() > 1e-4, "another solver ends elsewhere"
    native = pipeline.backend.engine("level-2")
    conditions = {name: values[:1] for name, values in pipeline.encode(["a red circle"]).items()}
    tables = pipeline._programs.level(2, {"H": 8, "W": 8}).tables
    guidance = np.full(1, pipeline.bundle.manifest.guidance.default, np.float32)
    before = None
    for k in range(1, 5):
        inputs = {"latent": latents[k - 1][None].astype(np.float32), "timestep": sigmas[k : k + 1].astype(np.float32)}
        v = native.run({**inputs, "guidance": guidance, **conditions, **tables})["velocity"][0].astype(np.float64)
        if before is not None:
            h, r = sigmas[k + 1] - sigmas[k], (sigmas[k + 1] - sigmas[k]) / (sigmas[k] - sigmas[k - 1])
            expected = latents[k - 1] + h * ((1 + r / 2) * v - r / 2 * before)
            np.testing.assert_allclose(latents[k], expected, atol=1e-5)
        before = v
