"""TensorRT without a GPU: the builder and the backend on fakes that show the API of one real release each."""

import json
import re
import shutil
from base64 import b64decode
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import numpy as np
import onnx
import pytest

import benchmark
from conftest import run
from ddit.exporter.cli import main as export
from ddit.runtime import Bundle, Pipeline, Request
from ddit.runtime.backends.artifacts import EngineStore
from ddit.runtime.backends.onnxruntime import host as onnxruntime
from ddit.runtime.cli import main as ddit_run
from ddit.runtime.decoding import to_pixels
from ddit.runtime.errors import BackendError, UsageError
from ddit.runtime.policies import Decision, Fixed, Policy
from ddit.runtime.tiling import tilings
from fake_cuda import FakeCuda
from fake_tensorrt import SCRATCH, VERSIONS, FakeTensorRT

SIZE = {"height": 128, "width": 64}


class Machine:
    """A fake machine with a GPU and a TensorRT, and a bundle on it."""

    def __init__(self, version: str, source: Path, folder: Path, monkeypatch):
        self.monkeypatch = monkeypatch
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        monkeypatch.setattr(onnxruntime, "PREPACK_LIMIT", 0)  # as the fake runs its graphs, for equality bit by bit
        self.bundle = folder / "a.bundle"
        shutil.copytree(source, self.bundle)
        self.move_to("Fake GPU", version)

    def move_to(self, gpu: str, version: str) -> None:
        """Another GPU or TensorRT."""
        self.cuda = FakeCuda(gpu).install(self.monkeypatch)
        self.trt = FakeTensorRT(version, self.cuda).install(self.monkeypatch)

    def build(self, *options: object):
        return run(export, "engines", self.bundle, *options)

    def plans(self) -> list[Path]:
        return sorted(self.bundle.glob("engines/*/engine.plan"))


@pytest.fixture(params=VERSIONS)
def machine(request, opset17_bundle, tmp_path, monkeypatch) -> Machine:
    """Every release in turn."""
    return Machine(request.param, opset17_bundle, tmp_path, monkeypatch)


@pytest.fixture
def one_machine(opset17_bundle, tmp_path, monkeypatch) -> Machine:
    """The newest release."""
    return Machine(VERSIONS[-1], opset17_bundle, tmp_path, monkeypatch)


@pytest.fixture
def built(one_machine) -> Machine:
    """With its engines."""
    assert one_machine.build().exit_code == 0
    return one_machine


def test_engines_are_built_once_and_make_the_same_picture(machine):
    result = machine.build("--json")
    assert result.exit_code == 0, result.stderr
    plans = json.loads(result.stdout)
    assert [plan["graph"] for plan in plans] == list(Bundle.open(machine.bundle).manifest.graphs)
    assert all(plan["built"] and plan["new"] for plan in plans)
    assert {plan["backend"] for plan in plans} == {"tensorrt"}
    assert {plan["graph"]: plan["scratch"] for plan in plans} == {
        plan["graph"]: SCRATCH.get(plan["graph"], 512) for plan in plans
    }
    assert {path.parent.name for path in machine.plans()} == {plan["key"] for plan in plans}

    again = machine.build()
    assert f"0 engines built in 0 s, {len(plans)} were there already" in again.stderr
    assert machine.trt.builds == len(plans)

    levels = Fixed((2, 4) * 3)
    expected = Pipeline.open(machine.bundle, backend="cpu")("a red circle", seed=3, schedule=levels, **SIZE)
    actual = Pipeline.open(machine.bundle, backend="tensorrt")("a red circle", seed=3, schedule=levels, **SIZE)
    # nearly: the engines' weights have the LoRA merged into them
    np.testing.assert_allclose(actual.latent, expected.latent, atol=1e-5)
    assert np.abs(np.asarray(actual.image, int) - np.asarray(expected.image)).max() <= 1
    for one, other in zip(actual.trace.steps, expected.trace.steps, strict=True):
        assert one.statistic == pytest.approx(other.statistic, rel=1e-4)


def test_lora_is_merged_into_an_engine_s_weights(built):
    plans = {plan["name"]: plan for plan in (json.loads(path.read_text()) for path in built.plans())}
    names = {tensor.name for tensor in onnx.load_from_string(b64decode(plans["level-4"]["model"])).graph.initializer}
    assert "merged.0" in names
    assert not [name for name in names if "lora" in name]


def test_8_6_gets_half_precision_by_flag_and_the_others_by_type(machine):
    manifest = machine.bundle / "bundle.json"
    manifest.write_text(manifest.read_text().replace('"dtype": "fp32"', '"dtype": "fp16"'))
    assert machine.build("--level", 4, "--workspace", "2GiB").exit_code == 0
    for config in machine.trt.configs:
        assert ("FP16" in config._flags) == (machine.trt.__version__ == "8.6.0")
        assert config._pools == {"WORKSPACE": 2 << 30}
        assert config._flags >= {"TF32"}


def test_bfloat16_needs_a_release_that_has_it(machine):
    manifest = machine.bundle / "bundle.json"
    manifest.write_text(manifest.read_text().replace('"dtype": "fp32"', '"dtype": "bf16"'))
    result = machine.build()
    if machine.trt.__version__ == "8.6.0":
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1] == (
            "error: TensorRT 8.6.0 has no bfloat16; export the bundle with --dtype fp16 --opset 17"
        )
    else:
        assert result.exit_code == 0


def test_a_graph_that_is_too_new_is_named(tiny_bundle, tmp_path, monkeypatch):
    result = Machine("8.6.0", tiny_bundle, tmp_path, monkeypatch).build()
    assert result.exit_code == 1
    assert (
        "TensorRT 8.6.0 cannot read clip: opset 23 is not supported (node number 3); opset 23 is for" in result.stderr
    )


def test_a_latent_grows_as_on_the_host(built):
    """Small and full size take turns in the workspaces, beside a sample that never grows."""
    size = {"height": 128, "width": 128}
    requests = [Request("red", seed, 6, text, **size) for seed, text in enumerate(("progressive:delta=0.5", "native"))]
    expected, actual = (Pipeline.open(built.bundle, backend=name).run(requests) for name in ("cpu", "tensorrt"))
    assert {record.scale for record in actual[0].trace.steps} == {0.5, 1.0}
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one.latent, other.latent, atol=1e-5)


def test_a_latent_grows_only_to_sizes_that_engines_were_built_for(one_machine, tmp_path):
    profile = tmp_path / "one.toml"
    profile.write_text(
        "[[entry]]\nheight = [128, 128, 128]\nwidth = [128, 128, 128]\ntext = [16, 16, 32]\nbatch = [1, 1, 1]\n"
    )
    assert one_machine.build("--profile", profile).exit_code == 0
    pipeline = Pipeline.open(one_machine.bundle, backend="tensorrt")
    pipeline.resolve([Request("red", schedule="native", height=128, width=128)])
    with pytest.raises(UsageError, match=r"height 64, width 64.* is outside what the TensorRT engine"):
        pipeline.resolve([Request("red", schedule="progressive", height=128, width=128)])


def test_tiles_that_engines_hold(built):
    """The profile begins at 64 pixels, and the short tiles at the edges would have 32."""
    latents = np.random.default_rng(0).standard_normal((1, 4, 16, 20), dtype=np.float32)
    pipeline = Pipeline.open(built.bundle, backend="tensorrt", vae_tiling=64)
    ((picture,),) = pipeline.decode(latents)
    engine = Pipeline.open(built.bundle, backend="cpu").backend.engine("vae_decoder")
    short, whole = tilings(pipeline.bundle.manifest.latent, 16, 20, 64)
    assert {"height": 32, "width": 64} in short.sizes()
    assert whole.sizes() == [{"height": 64, "width": 64}]
    expected = np.empty((3, 128, 160), np.float32)
    for _, rows, columns, values in whole.decode(latents, lambda tile: (yield engine.run({"latent": tile})["image"])):
        expected[:, rows, columns] = values[0]
    np.testing.assert_array_equal(np.asarray(picture), to_pixels(expected[:, None])[0])


def test_tiles_that_no_engine_holds_are_refused_first(built):
    pipeline = Pipeline.open(built.bundle, backend="tensorrt", vae_tiling=32)
    pipeline.backend.deserialize = None
    words = r"^the VAE cannot decode tiles of 32 pixels here: height 32, width 32, batch 1 is outside what the TensorRT"
    with pytest.raises(UsageError, match=words):
        pipeline("red", steps=1, **SIZE)


def test_attention_may_decompose(tiny_bundle, tmp_path, monkeypatch):
    machine = Machine(VERSIONS[-1], tiny_bundle, tmp_path, monkeypatch)
    assert machine.build("--level", 4).exit_code == 0  # the fake's builder refuses an attention that may not
    others = len(Bundle.open(machine.bundle).manifest.levels) - 1
    assert len(machine.plans()) == len(Bundle.open(machine.bundle).manifest.graphs) - others


def test_profiles_become_optimization_profiles(one_machine, tmp_path):
    profile = tmp_path / "two.toml"
    profile.write_text(
        """
        [[entry]]
        height = [128, 128, 128]
        width = [64, 128, 192]
        text = [16, 16, 32]
        batch = [1, 1, 1]
        [[entry]]
        height = [256, 256, 256]
        width = [256, 256, 256]
        text = [16, 16, 32]
        batch = [1, 2, 4]
        """
    )
    assert one_machine.build("--profile", profile).exit_code == 0
    plans = [json.loads(path.read_text()) for path in one_machine.plans()]
    shapes = {plan["name"]: plan["profiles"] for plan in plans}
    assert shapes["level-4"][0]["latent"] == [[1, 4, 16, 8], [1, 4, 16, 16], [1, 4, 16, 24]]
    assert shapes["level-4"][1]["rope_cos"][0] == [8, 8, 16]
    assert shapes["vae_decoder"][1]["latent"] == [[1, 4, 32, 32], [2, 4, 32, 32], [4, 4, 32, 32]]

    pipeline = Pipeline.open(one_machine.bundle, backend="tensorrt")
    assert pipeline("red", steps=2, height=256, width=256).image.size == (256, 256)
    assert pipeline("red", steps=2, height=128, width=192).image.size == (192, 128)
    with pytest.raises(UsageError, match=r"height 192, width 192, .* was built for \(height 128, width 64 to 192"):
        pipeline("red", steps=2, height=192, width=192)


def test_a_profile_beyond_the_bundle_s_is_refused(one_machine):
    result = one_machine.build("--profile", "1024")
    assert result.exit_code == 2
    assert "profile '1024'" in result.stderr
    assert "leaves the bundle's own" in result.stderr


@dataclass(frozen=True)
class Coin(Policy):
    """Levels as if tossed, from the digits of what was measured: soon every sample goes its own way."""

    def decide(self, history):
        measured = history.deviations
        return Decision(4 if measured and int(1e3 * measured[4].mean()) % 2 else 2)

    def __str__(self):
        return "coin"


def test_samples_that_part_ways_are_the_same_as_on_the_cpu(built):
    options = {"seeds": [1, 2, 3], "steps": 8, "schedule": Coin(), **SIZE}
    prompts = ["a red circle", "a blue square", "a green star"]
    expected = Pipeline.open(built.bundle, backend="cpu").batch(prompts, **options)
    actual = Pipeline.open(built.bundle, backend="tensorrt").batch(prompts, **options)
    levels = [result.trace.levels for result in expected]
    assert len({tuple(one) for one in levels}) == 3, "the schedules must differ for this test to say something"
    assert [result.trace.levels for result in actual] == levels
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one.latent, other.latent, atol=1e-5)


def test_a_switch_moves_nothing_and_steps_are_replayed(built):
    pipeline = Pipeline.open(built.bundle, backend="tensorrt")
    pipeline("red", schedule=Fixed((2, 4) * 2), **SIZE)
    contexts, used = built.trt.contexts, built.cuda.used
    waits, launches = built.cuda.synchronizations, built.cuda.launches
    pipeline("red", schedule=Fixed((2, 4) * 10), **SIZE)
    assert built.trt.contexts == contexts, "a second run has the first one's bound engines"
    assert built.cuda.used == used
    assert built.cuda.launches - launches == 20, "every step is one replayed graph"
    # a step waits once, for its deviations; the rest is the start, the encoders and the decoder
    assert built.cuda.synchronizations - waits <= 20 + 20


def test_another_share_of_carried_detail_takes_no_more_memory(built):
    pipeline = Pipeline.open(built.bundle, backend="tensorrt")
    schedule = Fixed((4, 2, 4, 4))  # nothing to carry at first, then the share
    results, used = {}, set()
    for carry in (0.1, 0.2, 0.1, 0.3):
        results[carry] = pipeline("red", schedule=schedule, carry=carry, **SIZE).latent
        used.add(built.cuda.used)
    assert len(used) == 1
    cpu = Pipeline.open(built.bundle, backend="cpu")
    for carry, latent in results.items():
        np.testing.assert_allclose(latent, cpu("red", schedule=schedule, carry=carry, **SIZE).latent, atol=1e-5)


def test_scratch_memory_is_the_largest_engine_s(built):
    before = built.cuda.used
    backend = Pipeline.open(built.bundle, backend="tensorrt").backend
    scratch = backend.scratch(1)
    assert scratch.nbytes == max(SCRATCH.values()) < sum(SCRATCH.values())
    assert backend.scratch(SCRATCH["level-2"]) is scratch
    assert built.cuda.used - before == scratch.nbytes


def test_the_benchmark_tells_the_levels_scratch_memory(built):
    table = benchmark.memory(Pipeline.open(built.bundle, backend="tensorrt"), [])
    shown = [f"{SCRATCH[level] / 1e6:,.1f}" for level in ("level-2", "level-4")]
    assert table[2:4] == [["scratch memory of level 2", shown[0]], ["scratch memory of level 4", shown[1]]]


@pytest.mark.parametrize(
    ("gpu", "version", "words"),
    [
        ("Other GPU", VERSIONS[-1], "was built for Fake GPU .* this is Other GPU"),
        ("Fake GPU", VERSIONS[-2], f"TensorRT {VERSIONS[-1]}; this is Fake GPU .*TensorRT {VERSIONS[-2]}"),
    ],
)
def test_a_plan_for_another_machine_is_not_loaded(built, gpu, version, words):
    built.move_to(gpu, version)
    result = run(ddit_run, "generate", built.bundle, "red", "--backend", "tensorrt")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.endswith(f"run: ddit-export engines {built.bundle}")
    with pytest.raises(BackendError, match=words):
        Pipeline.open(built.bundle, backend="tensorrt")


def test_a_plan_of_another_graph_is_not_loaded(built, opset17_bundle):
    manifest = built.bundle / "bundle.json"
    content = json.loads(manifest.read_text())
    content["files"]["level-4.onnx"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    with pytest.raises(BackendError, match="engine of level-4 was built from another version of the graph"):
        Pipeline.open(built.bundle, backend="tensorrt")


def test_without_engines_the_message_says_how_to_build_them(one_machine):
    with pytest.raises(BackendError, match=r"has no TensorRT engine of clip yet; run: ddit-export engines .*a\.bundle"):
        Pipeline.open(one_machine.bundle, backend="tensorrt")


def test_a_truncated_plan_is_found_and_rebuilt(built):
    plan = built.plans()[0]
    plan.write_bytes(plan.read_bytes()[:-5])
    result = run(ddit_run, "generate", built.bundle, "red", "--steps", 4, "--backend", "tensorrt",
                 "--out", built.bundle.parent / "out.png")  # fmt: skip
    assert result.exit_code == 1
    assert "is damaged" in result.stderr
    assert "1 engines built" in built.build().stderr
    Pipeline.open(built.bundle, backend="tensorrt")("red", steps=4)


def test_a_renamed_plan_is_not_one(built):
    plan = built.plans()[0].parent
    plan.rename(plan.with_name("0" * 16))
    with pytest.raises(BackendError, match="has no TensorRT engine of"):
        Pipeline.open(built.bundle, backend="tensorrt")


def test_too_little_memory_is_said_before_anything_is_loaded(built):
    pipeline = Pipeline.open(built.bundle, backend="tensorrt")
    built.cuda.total = built.cuda.used + 100
    with pytest.raises(BackendError, match=r"GPU memory is too small: the engines need 0\.00 GB .* are free"):
        pipeline("red", steps=4)
    assert built.trt.contexts == 0


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("Could not find any implementation for node /blocks.0/attn.", "has no kernel for node /blocks.0/attn; try"),
        (  # TensorRT 8.6.0 on an H200
            "10: [optimizer.cpp::computeCosts::3873] Error Code 10: Internal Error (Could not find any implementation "
            "for node {ForeignNode[(Unnamed Layer* 299) [Constant] + (Unnamed Layer* 301) [Shuffle]...node_cat_24]}.)",
            r"has no kernel for node \{ForeignNode\[\(Unnamed Layer\* 299\) .*node_cat_24\]\}; try",
        ),
        ("Error Code 2: OutOfMemory (no further information)", "out of memory with .* GB free on Fake GPU"),
        ("Internal error: what is this", "could not build clip: Internal error: what is this"),
    ],
)
def test_what_the_builder_reports_becomes_a_line(one_machine, failure, words):
    one_machine.trt.failure = failure
    result = one_machine.build()
    assert result.exit_code == 1
    assert re.search(words, result.stderr.splitlines()[-1])
    assert not one_machine.plans()


def test_a_killed_builder_leaves_a_store_that_works(one_machine):
    store = EngineStore(Bundle.open(one_machine.bundle))
    store.folder.mkdir()
    assert one_machine.build("--level", 2).exit_code == 0
    key = one_machine.plans()[0].parent.name
    shutil.rmtree(store.folder / key)
    (store.folder / f".{key}.partial").mkdir()  # killed while writing
    (store.folder / f".{key}.partial" / "engine.plan").write_bytes(b"half")
    (store.folder / f".{key}.weights").write_bytes(b"half")  # killed while building
    assert one_machine.build().exit_code == 0
    assert not list(store.folder.glob(".*.partial"))
    assert not list(store.folder.glob(".*.weights"))
    Pipeline.open(one_machine.bundle, backend="tensorrt")("red", steps=4)


def test_timings_are_kept_per_gpu_and_merged(one_machine, tmp_path):
    assert one_machine.build().exit_code == 0
    (cache,) = (tmp_path / "cache" / "ddit").glob("*.cache")
    assert cache.name == f"timing-Fake-GPU-{VERSIONS[-1]}.cache"
    assert b"timed;" in cache.read_bytes()
    named = tmp_path / "my.cache"
    named.write_bytes(b"damaged")
    shutil.rmtree(one_machine.bundle / "engines")
    assert one_machine.build("--timing-cache", named).exit_code == 0
    assert named.read_bytes().startswith(b"timed;")


def test_a_second_builder_waits_and_finds_it_built(one_machine):
    store = EngineStore(Bundle.open(one_machine.bundle))
    assert one_machine.build().exit_code == 0
    key = one_machine.plans()[0].parent.name
    results = []
    with store.lock(key):
        thread = Thread(target=lambda: results.append(one_machine.build()))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
    thread.join(30)
    assert "0 engines built" in results[0].stderr


def test_without_a_gpu_the_driver_is_asked_first(one_machine):
    one_machine.cuda.devices = 0
    one_machine.cuda.install(one_machine.monkeypatch)
    result = one_machine.build()  # the fake crashes like TensorRT if it is touched
    assert result.exit_code == 1
    assert "no GPU can be used here: the NVIDIA driver answers CUDA_ERROR_NO_DEVICE" in result.stderr


def test_the_fastest_backend_is_chosen(built, tmp_path):
    assert Pipeline.open(built.bundle).backend.name == "tensorrt"
    built.cuda.devices = 0
    built.cuda.install(built.monkeypatch)
    assert Pipeline.open(built.bundle).backend.name == "cpu"


def test_inspect_shows_the_engines_and_verify_runs_them(built):
    shown = run(ddit_run, "inspect", built.bundle, "--json")
    plans = json.loads(shown.stdout)["plans"]
    assert {plan["graph"] for plan in plans} == set(Bundle.open(built.bundle).manifest.graphs)
    assert all(plan["target"]["gpu"] == "Fake GPU" for plan in plans)
    text = run(ddit_run, "inspect", built.bundle).stdout
    assert f"Engines for Fake GPU (compute capability 9.0), TensorRT {plans[0]['target']['tensorrt']}" in text
    assert "Backend tensorrt" in text
    assert all(plan["key"] in text for plan in plans)  # in 80 columns

    verified = json.loads(run(ddit_run, "verify", built.bundle, "--json").stdout)
    assert (verified["backend"], verified["plans"], verified["passed"]) == ("tensorrt", len(plans), True)
    assert len(verified["checks"]) > len(plans)

    plan = built.plans()[0]
    plan.write_bytes(plan.read_bytes()[::-1])
    result = run(ddit_run, "verify", built.bundle)
    assert result.exit_code == 1
    assert "has a wrong hash" in result.stderr


def test_a_bundle_and_its_engines_in_one_go(tiny_pipeline, opset17_bundle, tmp_path, monkeypatch):
    machine = Machine(VERSIONS[-1], opset17_bundle, tmp_path, monkeypatch)
    machine.bundle = tmp_path / "b.bundle"
    options = ("--model", tiny_pipeline, "--levels", "2", "--dtype", "fp32", "--profile", "256", "--opset", "18")
    for _ in range(2):
        result = run(export, "flux", *options, "--engines", "tensorrt", "--out", machine.bundle)
        assert result.exit_code == 0, result.stderr
    assert "level-2: built already" in result.stderr, "the engines of an unchanged graph stay"
    assert machine.trt.builds == len(machine.plans()) == len(Bundle.open(machine.bundle).manifest.graphs)

    machine.cuda.devices = 0
    machine.cuda.install(monkeypatch)
    result = run(export, "flux", *options, "--engines", "tensorrt", "--out", tmp_path / "c.bundle")
    assert result.exit_code == 1
    assert "no GPU can be used here" in result.stderr
    assert not (tmp_path / "c.bundle").exists(), "said before the export, not after it"


def test_engines_of_graphs_that_are_gone_are_not_taken_over(built, tmp_path):
    opened = Bundle.open(built.bundle)
    graphs = len(opened.manifest.graphs)
    new = Bundle(tmp_path / "new", opened.manifest)
    EngineStore(new).adopt(EngineStore(opened))
    assert len(EngineStore(new).engines()) == len(built.plans()) == graphs
    opened.manifest.files["level-4.onnx"] = opened.manifest.files["level-2.onnx"]
    newer = Bundle(tmp_path / "newer", opened.manifest)
    EngineStore(newer).adopt(EngineStore(opened))
    assert len(EngineStore(newer).engines()) == graphs - 1
    assert len(built.plans()) == graphs, "the older bundle stays whole until the new one is in its place"
