"""TensorRT-RTX's own parser and builder, which need no GPU; skipped where the library is not installed."""

import json
import shutil
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import run
from ddit.exporter.cli import main as export
from ddit.runtime import Bundle
from ddit.runtime.backends import registry
from ddit.runtime.backends.tensorrt import compat, rtx
from ddit.runtime.backends.tensorrt.builder import parse
from ddit.runtime.cli import main as ddit_run
from ddit.runtime.errors import BackendError, UsageError
from fake_cuda import FakeCuda

installed = pytest.mark.skipif(
    not (find_spec(rtx.WHOLE) or find_spec(rtx.BINDINGS)), reason="pip install 'ddit[tensorrt-rtx]'"
)
BACKEND = ("--backend", "tensorrt-rtx")


@pytest.fixture
def bundle(tiny_bundle, tmp_path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "a.bundle")


@installed
@pytest.mark.parametrize("which", ["tiny_bundle", "opset17_bundle", "wan_bundle"])
def test_every_graph_is_read(request, tmp_path, which):
    """What no fake can tell: whether TensorRT's parser takes the graphs, also those for its oldest release."""
    path = shutil.copytree(request.getfixturevalue(which), tmp_path / "a.bundle")
    opened = Bundle.open(path)
    trt = rtx.import_tensorrt_rtx()
    for name, info in opened.manifest.graphs.items():
        _logger, _builder, network, _parser = parse(trt, opened, name, "merged")
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        outputs = [network.get_output(index) for index in range(network.num_outputs)]
        assert {one.name for one in inputs} == {spec.name for spec in info.inputs}
        assert {one.name for one in outputs} == {spec.name for spec in info.outputs}


@installed
def test_engines_are_built_for_a_named_target(bundle):
    options = ("--level", 4, "--json")
    result = run(export, "engines", bundle, *BACKEND, "--target", "sm89", *options)
    assert result.exit_code == 0, result.stderr
    engines = json.loads(result.stdout)
    graphs = [name for name in Bundle.open(bundle).manifest.graphs if name not in ("level-2", "level-8")]
    assert [one["graph"] for one in engines] == graphs
    version = rtx.import_tensorrt_rtx().__version__
    assert {json.dumps(one["target"]) for one in engines} == {
        json.dumps({"tensorrt_rtx": version, "compute_capability": "sm89"})
    }
    for one in engines:
        assert one["new"]
        assert (bundle / "engines" / one["key"] / "engine.plan").stat().st_size == one["size"] > 1000
    again = run(export, "engines", bundle, *BACKEND, "--target", "sm89", "--level", 4)
    assert f"0 engines built in 0 s, {len(graphs)} were there already; for sm89, TensorRT-RTX {version}" in again.stderr
    shown = run(ddit_run, "inspect", bundle)
    assert f"Engines for sm89, TensorRT-RTX {version}" in shown.stdout


@installed
def test_engines_of_clips_are_built(wan_bundle, tmp_path):
    path = shutil.copytree(wan_bundle, tmp_path / "a.bundle")
    result = run(export, "engines", path, *BACKEND, "--target", "sm120", "--json")
    assert result.exit_code == 0, result.stderr
    engines = json.loads(result.stdout)
    assert [one["graph"] for one in engines] == list(Bundle.open(path).manifest.graphs)
    assert all((path / "engines" / one["key"] / "engine.plan").stat().st_size == one["size"] for one in engines)


@installed
def test_on_a_gpu_that_engines_were_not_built_for(bundle, monkeypatch):
    """Hopper, for which nothing can be built."""
    trt = rtx.import_tensorrt_rtx()
    FakeCuda("A Hopper").install(monkeypatch)  # of compute capability 9.0
    with pytest.raises(UsageError, match="builds nothing for sm90; it knows sm75, sm80, sm86, sm89, sm120"):
        rtx.TensorRTRTXBuilder(lambda _: None, lambda _: nullcontext(lambda *_: None))
    opened = Bundle.open(bundle)
    for target in ("sm86", "sm120"):
        builder = rtx.TensorRTRTXBuilder(lambda _: None, lambda _: nullcontext(lambda *_: None), target=target)
        (built,) = builder.build(opened, opened.manifest.profile, ["clip"])
        assert built.new  # an engine for another target is another engine
    version = f"TensorRT-RTX {trt.__version__}"
    words = f"engine of clip was built for sm120, {version}, sm86, {version}; this is sm90, .*--backend tensorrt-rtx"
    with pytest.raises(BackendError, match=words):
        registry.open_backend("tensorrt-rtx", opened)


@installed
def test_half_precision_s_attention_is_a_kernel_of_its_own(tiny_pipeline, tmp_path):
    """In float32 none exists, and attention is built of plain layers; in half precision that is not needed."""
    from tiny import half_precision_level

    trt = rtx.import_tensorrt_rtx()
    logger = compat.make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(compat.network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(half_precision_level(tiny_pipeline, tmp_path)))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    shapes = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        one = network.get_input(index)
        size = [4 if dim == -1 else dim for dim in one.shape]
        if one.name == "latent":
            size[2:] = [8, 8]
        shapes.set_shape(one.name, size, size, size)
    config.add_optimization_profile(shapes)
    assert builder.build_serialized_network(network, config) is not None, logger.errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "no GPU tells here what to build for"),
        (["--target", "sm90"], "builds nothing for sm90; it knows sm75, sm80, sm86, sm89, sm120"),
        (["--target", "sm89", "--timing-cache", "a.cache"], "are built without --timing-cache"),
    ],
)
@installed
def test_bad_options(bundle, monkeypatch, options, words):
    monkeypatch.setattr(rtx, "why_no_gpu", lambda: "no NVIDIA driver is installed")
    result = run(export, "engines", bundle, *BACKEND, *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_without_the_library(bundle, monkeypatch):
    monkeypatch.setattr(rtx, "find_spec", lambda name: None)
    result = run(export, "engines", bundle, *BACKEND, "--target", "sm89")
    assert result.exit_code == 1
    assert "TensorRT-RTX is not installed; run: pip install 'ddit[tensorrt-rtx]'" in result.stderr


def test_nobody_gets_it_unasked():
    kind = registry.kind_of("tensorrt-rtx")
    assert (kind.rank, kind.device, kind.exact_float32, kind.needs_build) == (None, "gpu", False, True)
