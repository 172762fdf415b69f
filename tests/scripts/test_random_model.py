"""scripts/random_model.py on a tiny configuration."""

import random_model
from conftest import WAN_PROFILE, run
from ddit.exporter.adapter import load_adapter
from ddit.exporter.cli import main as export
from ddit.runtime import Pipeline


def test_a_random_model_is_exported_and_run_at_every_level(tiny_pipeline, tmp_path):
    out, bundle = tmp_path / "random", tmp_path / "random.bundle"
    blocks = ("--double-blocks", 2, "--single-blocks", 1)
    result = run(random_model.main, tiny_pipeline, out, *blocks, "--levels", "2,4", "--dtype", "fp32")
    assert result.exit_code == 0, result.stderr
    adapter = load_adapter(out / "adapter.safetensors")
    assert [*adapter.configs] == [4]
    assert all(tensor.abs().max() > 0 for tensor in adapter.tensors.values())
    result = run(export, "flux", "--model", out, "--profile", "256", "--out", bundle)
    assert result.exit_code == 0, result.stderr
    pipeline = Pipeline.open(bundle, backend="cpu")
    assert pipeline.bundle.manifest.patches == (2, 4)
    weights = pipeline.bundle.file("transformer.safetensors").read_bytes()
    assert b'"transformer_blocks.1.' in weights
    assert b'"single_transformer_blocks.1.' not in weights
    assert pipeline("a red circle", schedule="fixed:2x2,4x2", height=64, width=64).image.size == (64, 64)


def test_a_model_of_clips_is_exported_and_run_at_every_level(tiny_wan, tmp_path):
    out, bundle, profile = tmp_path / "random", tmp_path / "random.bundle", tmp_path / "tiny.toml"
    result = run(random_model.main, tiny_wan, out, "--blocks", 1, "--levels", "2,4", "--dtype", "fp32")
    assert result.exit_code == 0, result.stderr
    tensors = load_adapter(out / "adapter.safetensors").tensors
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    profile.write_text(WAN_PROFILE)
    result = run(export, "wan", "--model", out, "--profile", profile, "--out", bundle)
    assert result.exit_code == 0, result.stderr
    pipeline = Pipeline.open(bundle, backend="cpu")
    assert pipeline.bundle.manifest.patches == (2, 4)
    assert b'"blocks.1.' not in pipeline.bundle.file("transformer.safetensors").read_bytes()
    size = {"frames": 5, "height": 64, "width": 64, "text_length": 16}
    assert len(pipeline("a red circle", schedule="fixed:2x1,4x1", **size).frames) == 5


def test_blocks_that_a_model_has_not_are_refused(tiny_wan, tmp_path):
    result = run(random_model.main, tiny_wan, tmp_path / "out", "--single-blocks", 1)
    assert result.exit_code == 2
    assert result.stderr == "error: Wan 2.1 has no single blocks; leave --single-blocks out\n"


def test_a_folder_that_exists_is_kept(tiny_pipeline, tmp_path):
    result = run(random_model.main, tiny_pipeline, tmp_path)
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path} exists; choose another OUT\n"
