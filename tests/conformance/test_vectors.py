"""The Python runtime's vectors beside a plain NumPy transcription of docs/spec/."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import conformance as command
from conformance_bundle import CLIP, SIZE, STEPS
from ddit.runtime import Pipeline, Request
from ddit.runtime.bundle.manifest import UniPCInfo
from ddit.runtime.samplers.sigmas import sigmas, timesteps
from ddit.runtime.samplers.unipc import coefficients
from transcription import (
    Host,
    dct,
    growing_tables,
    noise_levels,
    position_tables,
    quantile,
    told,
    unipc_levels,
    unipc_solver,
)

ROOT = Path(__file__).parents[2]
KINDS = {
    "vectors": ("native", "fixed", "dynamic", "adaptive", "adams", "taylorseer", "teacache", "spectralcache", "dpcache",
                "progressive"),
    "clip_vectors": ("native", "fixed", "dynamic", "adaptive", "taylorseer", "teacache", "dpcache", "progressive"),
}  # fmt: skip


@pytest.fixture(scope="module", params=["vectors", "clip_vectors"])
def vectors_of(request) -> str:
    """Pictures, then clips: the name of the fixture with their vectors."""
    return request.param


@pytest.fixture(scope="module")
def folder(request, vectors_of) -> Path:
    return request.getfixturevalue(vectors_of)


@pytest.fixture(scope="module")
def bundle(request, vectors_of) -> Path:
    return request.getfixturevalue({"vectors": "rich_bundle", "clip_vectors": "rich_wan_bundle"}[vectors_of])


@pytest.fixture(scope="module")
def content(folder) -> dict:
    return json.loads((folder / "vectors.json").read_text())


@pytest.fixture(scope="module")
def host(bundle, vectors_of) -> Host:
    size = CLIP if vectors_of == "clip_vectors" else {"height": SIZE[0], "width": SIZE[1]}
    return Host(bundle, steps=STEPS, **size)


@pytest.fixture(scope="module")
def load(folder):
    return lambda name: np.load(folder / name)


def test_there_is_a_run_of_every_kind(content, vectors_of):
    written = " ".join(run["schedule"] for run in content["runs"])
    assert not [kind for kind in KINDS[vectors_of] if kind not in written]


def test_noise_of_the_specification_s_table():
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "docs/spec/sampling.md").read_text(encoding="utf-8"), re.M)
    assert rows
    for seed, numbers in rows:
        wanted = [float(number.replace("−", "-")) for number in numbers.split(", ")]
        found = np.random.default_rng(int(seed)).standard_normal((1, 2, 2), dtype=np.float32)
        assert found.ravel().tolist() == pytest.approx(wanted, abs=1e-7)


def test_noise_levels_and_tables(content, host, load):
    np.testing.assert_array_equal(load(content["sigmas"]), host.sigmas)
    asked = [told(host.manifest, sigma) for sigma in host.exact[:-1]]
    np.testing.assert_array_equal(load(content["timesteps"]), np.array(asked, np.float32))
    for patch, names in content["tables"].items():
        for name, wanted in position_tables(host.manifest, int(patch), host.size).items():
            np.testing.assert_allclose(load(names[name]), wanted, atol=2e-7)


@pytest.mark.parametrize("steps", [1, 2, 28, 50])
def test_noise_levels_of_other_numbers_of_steps(content, host, bundle, steps):
    found = Pipeline.open(bundle, backend="cpu").sigmas(steps, content["height"], content["width"], content["frames"])
    np.testing.assert_array_equal(found, noise_levels(host.manifest, steps, host.size))


def test_solver(content, host, load):
    sampler = host.manifest["sampler"]
    if sampler["kind"] != "flow_unipc":
        assert content["solver"] is None
        return
    sigmas = host.sigmas.astype(np.float64)
    wanted = [unipc_solver(sigmas, step, 0, sampler["order"]) for step in range(STEPS)]
    np.testing.assert_allclose(load(content["solver"]), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("shift", "steps"), [(3.0, 50), (3.0, 111), (1.0, 9)])  # of the last two, some nearly whole
def test_timesteps_of_unipc(shift, steps):
    sampler = {"kind": "flow_unipc", "shift": shift, "order": 2, "train_steps": 1000}
    wanted = [told({"sampler": sampler}, sigma) for sigma in unipc_levels(shift, 1000, steps)[:-1]]
    found = timesteps(UniPCInfo(**sampler, steps=steps), steps, 0)
    np.testing.assert_array_equal(found, np.array(wanted, np.float32))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("first", [0, 3])
def test_unipc(order, first):
    sampler = UniPCInfo(shift=3.0, order=order, train_steps=1000, steps=12)
    wanted = unipc_levels(3.0, 1000, 12)
    np.testing.assert_allclose(sigmas(sampler, 12, 0), wanted.astype(np.float32), rtol=1e-6)
    for i in range(first, 12):
        found = coefficients(wanted.tolist(), i, first, order)
        assert found == pytest.approx(unipc_solver(wanted, i, first, order), rel=1e-6, abs=1e-9)


def test_noise_and_growing(content, host, load):
    noise = load(content["noise"])
    np.testing.assert_array_equal(
        noise, np.random.default_rng(content["seed"]).standard_normal(noise.shape, dtype=np.float32)
    )
    np.testing.assert_allclose(load(content["coefficients"]), dct(noise), atol=1e-6)
    small = load(content["small_noise"])
    np.testing.assert_allclose(dct(small), dct(noise)[..., : small.shape[-2], : small.shape[-1]], atol=1e-6)
    for name, wanted in growing_tables(small.shape[-2:], host.size[-2:]).items():
        np.testing.assert_allclose(load(content["growing_tables"][name]), wanted, atol=1e-6)


def test_graphs(content, host, load):
    for one in content["graphs"]:
        inputs = {name: load(file) for name, file in one["inputs"].items()}
        inputs |= {name: np.array([row], np.int64) for name, row in one["ids"].items()}
        for name, value in host.call(one["graph"], inputs).items():
            np.testing.assert_allclose(load(one["outputs"][name]), value, rtol=1e-4, atol=1e-5)


def test_step_is_the_specification_s_equations(content, host, load):
    (one,) = [one for one in content["graphs"] if one["graph"] == "step"]
    x = {name: load(file)[0].astype(np.float64) for name, file in one["inputs"].items()}
    sigma, v = x["timestep"], x["velocity"]
    clean = x["latent"] - sigma * v
    for share, p in zip(x["carry"], host.coarse, strict=True):
        change = clean - x["kept_estimate"]
        v = v + share / sigma * (change - np.repeat(np.repeat(cut(change, p).mean(-1), p, axis=-2), p, axis=-1))
    error = v - np.tensordot(x["prediction"], x["velocities"], axes=1)
    corrected, kept = x["latent"] + x["correction"] * error, {}
    if "solver" in x:
        first = x["solver"][0] * -sigma * v + sum(
            share * (estimate - corrected) for share, estimate in zip(x["solver"][1:], x["estimates"], strict=True)
        )
        kept["next_estimates"] = np.stack([corrected - sigma * v, *x["estimates"][:-1]])
    else:
        first = x["dt"] * v
    third = first - x["difference1"] - x["difference2"]
    wanted = {
        "next_latent": corrected + first,
        "next_difference1": first,
        "next_difference2": first - x["difference1"],
        "next_kept_estimate": clean if x["keep_estimate"] > 0 else x["kept_estimate"],
        "next_velocities": np.stack([v, *x["velocities"][:-1]]) if x["keep_velocity"] > 0 else x["velocities"],
        **kept,
        "prediction_error": np.sqrt((cut(error, host.manifest["native"]) ** 2).mean(axis=(0, -1))),
        **{f"deviation_{p}": cut(third, p).std(axis=-1).mean(axis=0) for p in host.coarse},
    }
    assert wanted.keys() == one["outputs"].keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(load(one["outputs"][name])[0], value, rtol=1e-4, atol=1e-4)


def cut(values: np.ndarray, p: int) -> np.ndarray:
    """(…, H, W) → (…, H/p, W/p, p·p), patch by patch."""
    *others, height, width = values.shape
    rows = [
        np.stack([values[..., i : i + p, j : j + p].reshape(*others, -1) for j in range(0, width, p)], axis=-2)
        for i in range(0, height, p)
    ]
    return np.stack(rows, axis=-3)


def test_decisions_of_whole_runs(content, host, load):
    for run in content["runs"]:
        made = host.run(
            run["schedule"],
            content["ids"],
            load(content["noise"]),
            content["guidance"],
            content["carry"],
            content["negative_ids"],
        )
        assert [one["level"] for one in made["steps"]] == [one["level"] for one in run["steps"]], run["schedule"]
        for found, wanted in zip(made["steps"], run["steps"], strict=True):
            for name in ("step", "scale"):
                assert found[name] == wanted[name]
            for name in ("sigma", "gain", "correction"):
                assert found[name] == pytest.approx(wanted[name], rel=1e-6, abs=1e-9)
            assert found["prediction"] == pytest.approx(wanted["prediction"], rel=1e-6)
            assert (found["error"] or 0) == pytest.approx(wanted["error"] or 0, rel=1e-3, abs=1e-6)
            statistic = {str(p): quantile(values, run["rho"]) for p, values in found["deviations"].items()}
            assert statistic == pytest.approx(wanted["statistic"], rel=1e-3, abs=1e-6)
        np.testing.assert_allclose(made["latent"][0], load(run["latent"]), atol=1e-3)
        frames = load(run["frames"])
        assert frames.shape == (content["frames"] or 1, content["height"], content["width"], 3)
        assert abs(host.decode(made["latent"]) - frames).max() <= 1


def test_a_schedule_that_cannot_run_is_left_out(rich_bundle, tmp_path):
    request = Request("a star", 1, 3, height=64, width=64)
    made = command.write_vectors(
        Pipeline.open(rich_bundle, backend="cpu"), request, ("native", "progressive"), tmp_path
    )
    assert [run["schedule"] for run in made["runs"]] == ["native"]
