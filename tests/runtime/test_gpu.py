"""The GPU backends on a real GPU; skipped where there is none. ``pytest -m gpu``"""

import importlib.util
import shutil

import numpy as np
import pytest

from conftest import run
from ddit.exporter.cli import main as export
from ddit.runtime import Bundle, Pipeline
from ddit.runtime.backends.device.cuda import why_no_gpu
from ddit.runtime.backends.registry import open_backend
from ddit.runtime.errors import DditError
from ddit.runtime.policies import Fixed
from ddit.runtime.tools.verify import verify_graphs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_no_gpu() is not None, reason=f"no GPU: {why_no_gpu()}")]


@pytest.fixture(scope="module", params=["tensorrt", "cuda"])
def bundle(request, tiny_bundle, opset17_bundle, tmp_path_factory) -> tuple[Bundle, str]:
    """A bundle that is ready for a backend, and the backend's name."""
    backend = request.param
    if backend == "tensorrt":
        if importlib.util.find_spec("tensorrt") is None:
            pytest.skip("TensorRT is not installed")
        path = shutil.copytree(opset17_bundle, tmp_path_factory.mktemp("engines") / "a.bundle")
        result = run(export, "engines", path)
        assert result.exit_code == 0, result.stderr
        return Bundle.open(path), backend
    opened = Bundle.open(tiny_bundle)
    try:
        open_backend(backend, opened)
    except DditError as error:
        pytest.skip(str(error))
    return opened, backend


def test_every_graph_agrees_with_the_exporter_s_references(bundle):
    opened, backend = bundle
    checks = list(verify_graphs(open_backend(backend, opened)))
    assert {check.graph for check in checks} == set(opened.manifest.graphs)
    assert all(check.passed for check in checks)


def test_the_picture_is_the_cpu_s_at_three_sizes(bundle):
    opened, backend = bundle
    cpu, gpu = (Pipeline(opened, open_backend(name, opened)) for name in ("cpu", backend))
    for height, width in ((128, 64), (128, 192), (256, 256)):
        options = {"seed": 3, "schedule": Fixed((2, 4) * 4), "height": height, "width": width}
        expected, actual = cpu("a red circle", **options), gpu("a red circle", **options)
        assert np.linalg.norm(actual.latent - expected.latent) < 2e-2 * np.linalg.norm(expected.latent)


def test_replayed_steps_and_parted_batches_give_what_plain_ones_give(bundle):
    opened, backend = bundle
    pipeline = Pipeline(opened, open_backend(backend, opened))
    options = {"schedule": "dynamic:tau=0.0218", "steps": 8, "height": 128, "width": 64}
    prompts, seeds = ["a red circle", "a blue square", "a green star"], [1, 2, 3]
    together = [pipeline.batch(prompts, seeds=seeds, **options) for _ in range(3)][-1]
    for prompt, seed, one in zip(prompts, seeds, together, strict=True):
        alone = pipeline(prompt, seed=seed, **options)
        assert alone.trace.levels == one.trace.levels
        np.testing.assert_allclose(one.latent, alone.latent, atol=1e-2)


def test_tiles_are_the_cpu_s(bundle):
    """Tiles of 128, 96 and 64 pixels, which engines for the profile hold."""
    opened, backend = bundle
    latents = np.random.default_rng(0).standard_normal((1, 4, 32, 24), dtype=np.float32)
    expected, actual = (
        np.asarray(Pipeline(opened, open_backend(name, opened), vae_tiling=128).decode(latents)[0][0], float)
        for name in ("cpu", backend)
    )
    assert np.abs(actual - expected).mean() < 1
