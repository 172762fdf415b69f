"""DPCache: the path is the cheapest of all, its cost is what a run along it misses, and a bundle keeps it."""

import json
import shutil
from itertools import combinations

import numpy as np
import pytest

from conftest import run
from ddit.runtime import Bundle, Pipeline, Request
from ddit.runtime.cli import main
from ddit.runtime.conditioning.positions import level_tables
from ddit.runtime.errors import UsageError
from ddit.runtime.policies import DPCache, Fixed, Native, Reusing, RunHistory
from ddit.runtime.shapes import Size
from ddit.runtime.tools.calibrate_reuse import Setting, velocities
from ddit.runtime.tools.step_path import best_path, inner_products

SIZE = ("--steps", 12, "--height", 64, "--width", 64)
PROMPTS = ["a red circle", "a blue square", "a green star", "a red star"]


def fields(steps: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Velocities (T, 6) of three runs that are smooth, but for a kink at another place in each, and noise levels."""
    rng = np.random.default_rng(seed)
    sigmas = np.linspace(1, 0, steps + 1) ** 1.3
    time = np.linspace(0, 1, steps)[:, None]
    runs = [
        np.sin(time * rng.uniform(1, 6, 6) + rng.uniform(0, 6, 6)) + 2 * np.abs(time - rng.uniform(0.2, 0.9))
        for _ in range(3)
    ]
    return [one.astype(np.float32) for one in runs], sigmas.astype(np.float32)


def cost_along(path, runs, sigmas) -> float:
    """What the predictions between the steps of a path miss, one by one, by the recursion of TaylorSeer's authors."""
    total = 0.0
    for one in np.float64(runs):
        factors: list[np.ndarray] = []
        for k, velocity in enumerate(one):
            if k in path:
                new = [velocity]
                for i in range(min(2, len(factors))):
                    new.append((new[i] - factors[i]) / (k - last))  # noqa: F821
                factors, last = new, k
            else:
                x = k - last
                guess = factors[0] + factors[1] * x + factors[2] * x**2 / 2
                error = np.sqrt(np.mean((velocity - guess) ** 2))
                total += abs(float(sigmas[k + 1]) - float(sigmas[k])) * error / len(runs)
    return total


@pytest.mark.parametrize(
    ("steps", "count", "seed"), [(9, 4, 0), (10, 5, 1), (11, 6, 2), (8, 7, 3), (9, 9, 4), (9, 3, 5)]
)
def test_the_path_is_the_cheapest_of_all(steps, count, seed):
    runs, sigmas = fields(steps, seed)
    every = [(0, 1, 2, *rest) for rest in combinations(range(3, steps), count - 3)]
    cheapest = min(every, key=lambda path: cost_along(path, runs, sigmas))
    path, cost = best_path([inner_products(one) for one in runs], sigmas, count)
    assert path == cheapest
    assert cost == pytest.approx(cost_along(cheapest, runs, sigmas), rel=1e-4, abs=1e-7)


def test_a_run_computes_the_steps_of_the_path():
    path = (0, 1, 2, 5, 9, 10)
    policy, history = Reusing(Native(2), DPCache(12, path)), RunHistory(np.linspace(1, 0, 13))
    for _ in range(12):
        history.record(policy.decide(history), np.zeros((2, 2), np.float32), {})
    assert tuple(history.computed) == path


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return shutil.copytree(tiny_bundle, tmp_path / "a.bundle")


def calibrate(bundle, *options):
    return run(main, "calibrate", bundle, "--prompts", bundle.parent / "prompts.txt", *SIZE, *options)


def test_a_bundle_keeps_its_path_and_runs_follow_it(bundle):
    out = ("--out", bundle.parent / "o.png", "--trace", bundle.parent / "t.json")
    result = run(main, "generate", bundle, "a red circle", "--schedule", "dpcache", *SIZE, *out)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "no path of dpcache for this number of steps and size" in result.stderr

    result = calibrate(bundle, "--reuse", "dpcache", "--computed", 5, "--dry-run")
    assert "not kept" in result.stderr
    assert not Bundle.open(bundle).manifest.paths
    assert calibrate(bundle, "--reuse", "dpcache", "--computed", 6).exit_code == 0
    result = calibrate(bundle, "--reuse", "dpcache", "--computed", 5, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["held_out"]["computed"] == 5
    (kept,) = Bundle.open(bundle).manifest.paths
    assert list(kept.computed) == report["computed"]
    assert kept.computed[:3] == (0, 1, 2)
    assert "dpcache computes 5 of 12 steps at 64×64" in run(main, "inspect", bundle).stdout

    result = run(main, "generate", bundle, "a red circle", "--schedule", "native+dpcache", *SIZE, *out)
    assert result.exit_code == 0, result.stderr
    trace = json.loads((bundle.parent / "t.json").read_text())
    assert [step["step"] for step in trace["steps"] if step["level"]] == report["computed"]
    options = ("--height", 64, "--width", 64, *out)
    for other in (("--steps", 11, "--schedule", "dpcache"), ("--schedule", "fixed:2x11+dpcache", "--steps", 11)):
        result = run(main, "generate", bundle, "a red circle", *other, *options)
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)


def test_a_path_is_for_its_number_of_steps(tiny_bundle):
    policy = Reusing(Fixed((2,) * 9), DPCache(12, (0, 1, 2, 7)))
    with pytest.raises(UsageError, match="path is for 12 steps, not 9"):
        Request("a red circle", schedule=policy).resolve(Bundle.open(tiny_bundle).manifest, "cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--reuse", "dpcache", "--computed", 3), "more than 3 steps and fewer than all"),
        (("--reuse", "dpcache", "--computed", 12), "more than 3 steps and fewer than all"),
        (("--reuse", "dpcache", "--steps", 101), "of 100 at most"),
        (("--reuse", "dpcache", "--speedup", 2), "are for the search"),
        (("--computed", 5), "give --reuse dpcache too"),
        (("--reuse", "teacache", "--steps", 2), "a polynomial needs 10 changes"),
    ],
)
def test_what_cannot_be_found_is_refused(bundle, options, words):
    result = calibrate(bundle, *options)
    assert result.exit_code == 2
    assert words in result.stderr.splitlines()[-1]
    assert "making" not in result.stderr


def test_velocities_are_those_of_the_level(tiny_bundle):
    pipeline = Pipeline.open(tiny_bundle, backend="cpu")
    found, _ = velocities(pipeline, (3, "a red circle"), Setting(6, Size(64, 64)), Native(2))
    (resolved,) = pipeline.resolve([Request("a red circle", 3, 6, "native", 64, 64)])
    assert found.shape == (6, 4, 8, 8)
    engine = pipeline.backend.engine("level-2")
    manifest = pipeline.bundle.manifest
    tables = level_tables(manifest.positions, manifest.latent, 2, 2, {"H": 8, "W": 8})
    guidance = np.array([manifest.guidance.default], np.float32)
    inputs = {**pipeline.encode(["a red circle"]), **tables, "guidance": guidance}
    start = resolved.start((4, 8, 8), (4, 8, 8))[None]
    velocity = engine.run({**inputs, "latent": start, "timestep": resolved.sigmas[:1]})["velocity"][0]
    np.testing.assert_allclose(found[0], velocity, atol=1e-4)


def test_a_fitted_polynomial_is_kept_and_used(bundle):
    result = calibrate(bundle, "--reuse", "teacache", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    gate = Bundle.open(bundle).manifest.gate
    assert list(gate.coefficients) == report["coefficients"]
    assert len(gate.coefficients) == 5
    assert gate.source == "fitted to 22 steps of 2 prompts, 12 at 64×64"
    assert report["held_out"]["prompts"] == 2
    pipeline = Pipeline.open(bundle, backend="cpu")
    trace = pipeline("a red circle", schedule="teacache:0.1", steps=12, height=64, width=64).trace
    assert trace.schedule["reuse"]["coefficients"] == gate.coefficients
    assert "fitted to 22 steps" in run(main, "inspect", bundle).stdout
