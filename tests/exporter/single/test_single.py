"""ddit-export single: one call of ONNX Runtime beside the Python runtime."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image

from conformance_bundle import SIZES, STEPS
from conftest import run
from ddit.exporter.cli import main
from ddit.exporter.single.check import text_inputs
from ddit.runtime import Bundle, Pipeline

PROMPT, SEED = "a red circle and a zebra", 7
CONTENT = [0]


def make(bundle: Path, out: Path, *options: object) -> Path:
    result = run(main, "single", bundle, out, *options)
    assert result.exit_code == 0, result.stderr
    return out


class Single:
    """A single model, opened as anybody opens one."""

    def __init__(self, path: Path, bundle: Path):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.bundle = Bundle.open(bundle)
        self.kinds = {one.name: one.type for one in self.session.get_overridable_initializers()}

    def __call__(self, height: int, width: int, **settings: object) -> dict[str, np.ndarray]:
        shape = (self.bundle.manifest.latent.channels, height // 8, width // 8)
        noise = np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32)
        types = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
        given = {name: np.asarray(value, types[self.kinds[name]]) for name, value in settings.items()}
        names = [output.name for output in self.session.get_outputs()]
        inputs = {**text_inputs(self.bundle, PROMPT), "noise": noise, **given}
        return dict(zip(names, self.session.run(names, inputs), strict=True))


def check(
    found: dict[str, np.ndarray], pipeline: Pipeline, size: tuple[int, int], schedule: str | None, **more
) -> list:
    """Compare with the runtime's picture; the levels."""
    expected = pipeline(PROMPT, seed=SEED, schedule=schedule, height=size[0], width=size[1], **more)
    trace = expected.trace
    assert found["level"].tolist() == [level or 0 for level in trace.levels]
    assert abs(found["image"].astype(int) - np.asarray(expected.image)).max() <= 1
    assert found["image"].dtype == np.uint8
    np.testing.assert_allclose(found["latent"], expected.latent, atol=2e-3)
    np.testing.assert_array_equal(found["sigmas"], pipeline.sigmas(len(trace.steps), *size))
    if "adaptive" in (schedule or "adaptive"):
        wanted = [record.figures.get("expected_error", -1) for record in trace.steps]
        np.testing.assert_allclose(found["expected_error"], wanted, rtol=1e-2, atol=1e-6)
    if "statistic" in found:
        coarse = pipeline.bundle.manifest.coarse
        rows = [[record.statistic.get(patch, -1) for patch in coarse] for record in trace.steps]
        np.testing.assert_allclose(found["statistic"], rows, rtol=1e-2, atol=1e-6)
    return found["level"].tolist()


@pytest.fixture(scope="module")
def single(rich_bundle, tmp_path_factory) -> Single:
    return Single(make(rich_bundle, tmp_path_factory.mktemp("single") / "rich.onnx"), rich_bundle)


@pytest.fixture(scope="module")
def pipeline(rich_bundle) -> Pipeline:
    return Pipeline.open(rich_bundle, backend="cpu")


@pytest.mark.parametrize("size", SIZES)
def test_native(single, pipeline, size):
    levels = check(single(*size, levels=[2], tolerance=0, steps=STEPS), pipeline, size, "native", steps=STEPS)
    assert levels == [2] * STEPS


@pytest.mark.parametrize("size", SIZES)
def test_fixed(single, pipeline, size):
    listed = [2, 2, 8, 8, 4, 4, 4, 2, 2]
    levels = check(single(*size, levels=listed, tolerance=0, steps=9), pipeline, size, "fixed:2x2,8x2,4x3,2x2")
    assert levels == listed


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("tau", "rho", "warmup", "hold", "coarsest"),
    [(8.0, 0.4, 4, 3, 8), (3.0, 0.4, 3, 1, 8), (5.0, 0.5, 5, 1, 8), (5.0, 0.3, 3, 2, 4)],
)
def test_dynamic(single, pipeline, size, tau, rho, warmup, hold, coarsest):
    settings = {"tau": tau, "rho": rho, "warmup": warmup, "hold": hold, "coarsest": coarsest}
    written = "dynamic:" + ",".join(f"{name}={value}" for name, value in settings.items())
    found = single(*size, levels=CONTENT, tolerance=0, steps=20, **settings)
    levels = check(found, pipeline, size, written, steps=20)
    assert max(levels) <= coarsest


def test_dynamic_has_taken_every_level(single):
    """Or the comparison above says little."""
    settings = {"levels": CONTENT, "tolerance": 0, "steps": 20, "tau": 3, "rho": 0.4, "warmup": 3, "hold": 1}
    found = [single(*size, **settings)["level"] for size in SIZES]
    assert set(np.concatenate(found).tolist()) == {2, 4, 8}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("tolerance", "order"), [(0.02, 1), (0.2, 0), (0.2, 2), (3.0, 1)])
def test_adaptive(single, pipeline, size, tolerance, order):
    found = single(*size, levels=[2], tolerance=tolerance, order=order, steps=16)
    check(found, pipeline, size, f"adaptive:tolerance={tolerance},order={order}", steps=16)


def test_adaptive_predicts(single):
    assert 0 in single(*SIZES[0], tolerance=3, steps=16)["level"]


@pytest.mark.parametrize("size", SIZES)
def test_dynamic_with_adaptive(single, pipeline, size):
    found = single(*size, levels=CONTENT, tolerance=0.2, order=1, tau=5, warmup=4, hold=1, steps=20)
    levels = check(found, pipeline, size, "dynamic:tau=5,warmup=4,hold=1+adaptive:tolerance=0.2,order=1", steps=20)
    assert 0 in levels


def test_other_settings_of_a_run(single, pipeline):
    size = SIZES[1]
    found = single(*size, levels=[2, 2, 2, 4, 4, 8], tolerance=0, steps=6, guidance=1.5, carry=0.9)
    check(found, pipeline, size, "fixed:2x3,4x2,8", guidance=1.5, carry=0.9)


def test_one_step_and_a_list_that_is_too_short(single, pipeline):
    check(single(*SIZES[0], steps=1), pipeline, SIZES[0], None, steps=1)
    assert single(*SIZES[0], steps=4, levels=[2, 4], tolerance=0)["level"].tolist() == [2, 4, 4, 4]


def test_nothing_but_ids_and_noise(single, pipeline):
    check(single(*SIZES[2]), pipeline, SIZES[2], None)


def test_the_defaults_are_those_of_the_run_that_was_named(rich_bundle, tmp_path, pipeline):
    height, width = SIZES[0]
    named = ("--steps", STEPS, "--height", height, "--width", width)
    calibrated = Single(make(rich_bundle, tmp_path / "adaptive.onnx", *named, "--no-check"), rich_bundle)
    assert 0 in check(calibrated(height, width), pipeline, SIZES[0], None, steps=STEPS)
    options = (*named, "--schedule", "dynamic:absolute=1,tau=0.02,hold=1", "--no-check")
    absolute = Single(make(rich_bundle, tmp_path / "absolute.onnx", *options), rich_bundle)
    check(absolute(height, width), pipeline, SIZES[0], "dynamic:absolute=1,tau=0.02,hold=1", steps=STEPS)
    listed = Single(make(rich_bundle, tmp_path / "fixed.onnx", "--schedule", "fixed:2,8x3", "--no-check"), rich_bundle)
    assert check(listed(height, width), pipeline, SIZES[0], "fixed:2,8x3") == [2, 8, 8, 8]


def test_a_bundle_at_opset_17(opset17_bundle, tmp_path):
    made = Single(make(opset17_bundle, tmp_path / "old.onnx"), opset17_bundle)
    pipeline = Pipeline.open(opset17_bundle, backend="cpu")
    check(made(64, 64, levels=[2, 2, 4, 4, 2], steps=5, tolerance=0), pipeline, (64, 64), "fixed:2x2,4x2,2")


def test_a_bundle_without_coarse_levels_and_guidance(tiny_schnell, tmp_path):
    bundle = tmp_path / "schnell.bundle"
    options = ("--levels", "2", "--dtype", "fp32", "--profile", "256", "--out", bundle)
    result = run(main, "flux", "--model", tiny_schnell, *options)
    assert result.exit_code == 0, result.stderr
    made = Single(make(bundle, tmp_path / "schnell.onnx"), bundle)
    assert made.kinds.keys() == {"steps", "levels", "tolerance", "order"}
    found = made(64, 128, tolerance=3, steps=8)
    assert "statistic" not in found
    levels = check(found, Pipeline.open(bundle, backend="cpu"), (64, 128), "adaptive:3", steps=8)
    assert set(levels) == {0, 2}


def test_the_levels_twins(rich_bundle, tmp_path, pipeline):
    path = make(rich_bundle, tmp_path / "twins.onnx", "--backend", "cuda")
    assert "com.microsoft" in [one.domain for one in onnx.load(path, load_external_data=False).opset_import]
    made = Single(path, rich_bundle)
    check(made(64, 64, levels=[2, 8, 4], steps=3, tolerance=0), pipeline, (64, 64), "fixed:2,8,4")


def test_the_model_is_valid_and_says_what_it_needs(single, rich_bundle, tmp_path):
    path = make(rich_bundle, tmp_path / "valid.onnx", "--no-check")
    onnx.checker.check_model(path)
    about = json.loads(single.session.get_modelmeta().custom_metadata_map["ddit"])
    manifest = json.loads((rich_bundle / "bundle.json").read_text())
    for encoder in manifest["encoders"]:
        tokens = about["tokens"][f"{encoder['graph']}_ids"]
        assert tokens == {key: encoder["tokenizer"][key] for key in ("length", "pad_id")}
    assert about["patches"] == [2, 4, 8]


def test_every_weight_is_there_once(rich_bundle, tmp_path):
    path = make(rich_bundle, tmp_path / "once.onnx", "--no-check")
    stored = sum(file.stat().st_size for file in rich_bundle.glob("*.safetensors") if file.name != "parity.safetensors")
    tensors = len(onnx.load(path, load_external_data=False).graph.initializer)
    assert (tmp_path / "once.onnx.data").stat().st_size < stored + 4096 * tensors


def test_weights_in_the_bundle(rich_bundle, tmp_path, pipeline):
    shutil.copytree(rich_bundle, tmp_path / "models" / "rich.bundle")
    bundle = tmp_path / "models" / "rich.bundle"
    path = make(bundle, tmp_path / "rich.onnx", "--weights", "bundle")
    assert not (tmp_path / "rich.onnx.data").exists()
    assert path.stat().st_size < 5e6
    check(Single(path, bundle)(64, 64, levels=[2], tolerance=0, steps=3), pipeline, (64, 64), "native", steps=3)


def one_error(result, code: int, words: str) -> None:
    assert result.exit_code == code, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]


def test_errors(rich_bundle, wan_bundle, tmp_path):
    taken = tmp_path / "taken.onnx"
    taken.write_bytes(b"")
    one_error(run(main, "single", rich_bundle, taken), 2, "exists; choose another name")
    (tmp_path / "new.onnx.data").write_bytes(b"")
    one_error(run(main, "single", rich_bundle, tmp_path / "new.onnx"), 2, "new.onnx.data exists")
    out = tmp_path / "out.onnx"
    one_error(run(main, "single", tmp_path, out), 1, "is not a bundle")
    one_error(run(main, "single", wan_bundle, out), 2, "clips, the sampler flow_unipc, guidance by two passes")
    for schedule in ("teacache", "progressive", "dynamic+taylorseer"):
        one_error(run(main, "single", rich_bundle, out, "--schedule", schedule), 2, "native, fixed and dynamic")
    one_error(run(main, "single", rich_bundle, rich_bundle / "out.onnx"), 2, "lies in the bundle")
    one_error(run(main, "single", rich_bundle, out, "--weights", "bundle"), 2, "or leave --weights bundle out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.onnx.data", "taken.onnx"]


def test_a_model_that_makes_another_picture_is_not_kept(rich_bundle, tmp_path, monkeypatch):
    from ddit.exporter.single import model

    original = model._noise_levels
    monkeypatch.setattr(
        model,
        "_noise_levels",
        lambda main, *rest: main.op("Mul", original(main, *rest), main.outermost.constant(np.float32(0.9))),
    )
    one_error(run(main, "single", rich_bundle, tmp_path / "wrong.onnx"), 1, "another picture than the runtime")
    assert not [*tmp_path.iterdir()]


PAGE = (Path(__file__).parents[3] / "docs" / "single.md").read_text(encoding="utf-8")
TINY = "(4, 32, 32)"  # the tiny model's latent has fewer channels than the demo's


@pytest.fixture
def page_s_files(rich_bundle, tmp_path, monkeypatch) -> Path:
    """A folder with what the page's programs read."""
    monkeypatch.chdir(tmp_path)
    make(rich_bundle, tmp_path / "demo.onnx", "--no-check")
    ids = {
        name.removesuffix("_ids"): row.tolist() for name, row in text_inputs(Bundle.open(rich_bundle), PROMPT).items()
    }
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    return tmp_path


def test_the_page_s_python(page_s_files, pipeline):
    (example,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    exec(compile(example.replace("(16, 32, 32)", TINY), "docs/single.md", "exec"), {})
    expected = pipeline(PROMPT, seed=7, schedule="adaptive:0.1", height=256, width=256).image
    made = Image.open(page_s_files / "image.png")
    assert abs(np.asarray(made, dtype=int) - np.asarray(expected)).max() <= 1


def test_the_page_s_javascript(page_s_files):
    if (
        not shutil.which("node")
        or subprocess.run(["node", "-e", "require('onnxruntime-node')"], check=False).returncode
    ):
        pytest.skip("needs node and its package: npm install onnxruntime-node, and NODE_PATH for where that is")
    (example,) = re.findall(r"^```js\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    example = example.replace("16 * 32 * 32", "4 * 32 * 32").replace("[16, 32, 32]", "[4, 32, 32]")
    (page_s_files / "picture.js").write_text(example)
    subprocess.run(["node", "picture.js"], check=True)
    assert Image.open(page_s_files / "image.ppm").size == (256, 256)


def test_every_input_and_output_is_on_the_page(single):
    words = set(re.findall(r"`(\w+)`", PAGE.split("## Inputs and outputs")[1].split("## Weights")[0]))
    tensors = [*single.session.get_inputs(), *single.session.get_overridable_initializers()]
    assert {one.name for one in (*tensors, *single.session.get_outputs())} <= words
