"""The family wan: what it reads of a folder, what it refuses, and the bundle it makes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from transformers import AutoTokenizer

from ddit.exporter import families
from ddit.exporter.adapter import load_adapter
from ddit.exporter.families.wan.model import Wan, rotary_positions
from ddit.exporter.models import find_model
from ddit.runtime import Bundle
from ddit.runtime.backends.registry import open_backend
from ddit.runtime.conditioning.positions import rotary_tables
from ddit.runtime.conditioning.text import Tokenizer
from ddit.runtime.errors import ModelError
from ddit.runtime.samplers.sigmas import sigmas
from ddit.runtime.tools.verify import verify_graphs
from tiny_wan import SHIFT, euler, save_tiny_adapter, tiny_transformer


def wan(folder: Path, **settings) -> Wan:
    return Wan(find_model(str(folder)), (2, 4), "fp32", **settings)


@pytest.fixture
def changed(tiny_wan, tmp_path):
    """A copy of the tiny folder with other settings in one of its files; its weights stay where they are."""

    def change(file: str, **settings) -> Wan:
        folder = tmp_path / "model"
        shutil.copytree(tiny_wan, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        for weights in tiny_wan.glob("*/*.safetensors"):
            (folder / weights.relative_to(tiny_wan)).symlink_to(weights)
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return wan(folder)

    return change


def test_the_manifest_s_settings_are_the_pipeline_s(tiny_wan):
    family = wan(tiny_wan)
    assert family.latent.shape == ("B", 16, "F", "H", "W")
    assert [(axis.name, axis.downscale) for axis in family.latent.axes] == [("frames", 4), ("height", 8), ("width", 8)]
    sampler = family.sampler
    assert (sampler.kind, sampler.shift, sampler.order, sampler.train_steps) == ("flow_unipc", SHIFT, 2, 1000)
    assert (family.guidance.kind, family.guidance.default) == ("two_passes", 5.0)
    assert families.find_family("wan") is Wan


@pytest.mark.parametrize("head", [16, 24, 128])
def test_positions_are_diffusers(head):
    transformer = tiny_transformer(attention_head_dim=head)
    expected = transformer.rope(torch.zeros(1, 16, 3, 8, 10))
    own = rotary_tables(rotary_positions(head), {"frames": 3, "height": 4, "width": 5}, 1.0)
    for table, other in zip(own, expected, strict=True):
        np.testing.assert_allclose(table.reshape(-1, head), other.reshape(-1, head), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_euler_s_noise_levels_are_the_scheduler_s_own(changed, steps, shift):
    """WanPipeline lets the scheduler choose them, other than FluxPipeline."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    family = changed(
        "scheduler/scheduler_config.json", **{**dict(scheduler.config), "_class_name": euler().__class__.__name__}
    )
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(sigmas(family.sampler, steps, 100), scheduler.sigmas, atol=1e-6)


UNIPC_REFUSED = {
    "solver_type": "bh1",
    "predict_x0": False,
    "prediction_type": "epsilon",
    "use_flow_sigmas": False,
    "lower_order_final": False,
    "final_sigmas_type": "sigma_min",
    "thresholding": True,
    "disable_corrector": [0],
    "use_karras_sigmas": True,
    "use_dynamic_shifting": True,
    "num_train_timesteps": 500,
}


@pytest.mark.parametrize("setting", UNIPC_REFUSED)
def test_other_settings_of_the_scheduler_are_refused(changed, setting):
    value = UNIPC_REFUSED[setting]
    family = changed("scheduler/scheduler_config.json", **{setting: value})
    with pytest.raises(ModelError) as error:
        _ = family.sampler
    assert str(error.value) == (
        f"scheduler with {setting} = {value!r} is not supported; "
        "ddit samples with UniPCMultistepScheduler as Wan 2.1 uses it"
    )


def test_a_setting_that_the_file_lacks_is_diffusers_own(tiny_wan, tmp_path):
    shutil.copytree(tiny_wan, tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    del config["prediction_type"]
    path.write_text(json.dumps(config))
    assert UniPCMultistepScheduler.from_config(config).config.prediction_type == "epsilon"
    with pytest.raises(ModelError, match="prediction_type = 'epsilon' is not supported"):
        _ = wan(tmp_path / "model").sampler


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"solver_order": 3}, "the scheduler's settings are not usable: .*order"),
        ({"_class_name": "DDIMScheduler"}, "scheduler DDIMScheduler is not supported"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "use_dynamic_shifting = True is not supported; ddit samples with FlowMatchEulerDiscreteScheduler as Wan",
        ),
    ],
)
def test_other_schedulers_are_refused(changed, settings, words):
    family = changed("scheduler/scheduler_config.json", **settings)
    with pytest.raises(ModelError, match=words):
        _ = family.sampler


@pytest.mark.parametrize(
    ("file", "settings", "words"),
    [
        ("model_index.json", {"boundary_ratio": 0.875}, r"holds Wan 2\.2 \(boundary_ratio\)"),
        ("model_index.json", {"expand_timesteps": True}, r"holds Wan 2\.2 \(expand_timesteps\)"),
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, r"Wan 2\.2 \(transformer_2\)"),
        ("vae/config.json", {"is_residual": True}, r"holds Wan 2\.2 \(is_residual\)"),
        ("vae/config.json", {"patch_size": 2}, r"holds Wan 2\.2 \(a VAE with patches\)"),
        ("vae/config.json", {"scale_factor_temporal": 8}, "scale_factor_temporal is 8, .* that would be 4"),
        ("vae/config.json", {"z_dim": 48}, "the transformer's in_channels is 16, .* the vae: that would be 48"),
        ("transformer/config.json", {"added_kv_proj_dim": 32}, "makes clips from pictures"),
        ("transformer/config.json", {"image_dim": 32}, "makes clips from pictures"),
        ("transformer/config.json", {"patch_size": [1, 4, 4]}, r"patch_size is \[1, 4, 4\], .* \[1, 2, 2\]"),
        ("transformer/config.json", {"text_dim": 32}, "text_dim is 32, .* the text_encoder: that would be 24"),
        ("transformer/config.json", {"num_layers": 3}, "has no tensor 'blocks.2"),
    ],
)
def test_what_the_family_does_not_export_is_refused(changed, file, settings, words):
    family = changed(file, **settings)
    with pytest.raises(ModelError, match=words) as error:
        family.jobs()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompt", ["a red circle", "  a  red\n\tcircle ", "a red　circle", "", "  "])
def test_prompts_are_tokenised_as_the_pipeline_does(tiny_wan, tmp_path, prompt):
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    (info,) = wan(tiny_wan).save_tokenizers(tmp_path)
    own, _ = Tokenizer(tmp_path / info.tokenizer.file, info.tokenizer)(prompt, 12)
    tokenizer = AutoTokenizer.from_pretrained(tiny_wan / "tokenizer")
    expected = tokenizer(prompt_clean(prompt), padding="max_length", max_length=12, truncation=True).input_ids
    assert own.tolist() == expected


def test_an_adapter_s_values_reach_its_levels(tiny_wan, tmp_path):
    adapter = load_adapter(save_tiny_adapter(tmp_path / "a.safetensors", tiny_wan, (4,)))
    family = wan(tiny_wan, adapter=adapter)
    level = family.level(tiny_transformer(), 4)
    for name, parameter in level.own_parameters().items():
        assert torch.equal(parameter, adapter.value(4, name))


def test_the_bundle_s_graphs_compute_what_the_pipeline_computes(wan_bundle):
    """Every graph and the pipeline as a whole passed the parity gate, at sizes that were not traced."""
    manifest = Bundle.open(wan_bundle).manifest
    assert {result.graph for result in manifest.parity} == {*manifest.graphs, "pipeline"}
    assert all(result.checked == "full" for result in manifest.parity)
    assert {result.sizes["F"] for result in manifest.parity if "F" in result.sizes} == {1, 2}
    # as `ddit-run verify` finds them again
    checks = [*verify_graphs(open_backend("cpu", Bundle.open(wan_bundle)))]
    assert {check.graph for check in checks} == set(manifest.graphs)
    assert all(check.passed for check in checks)


def test_levels_and_the_gate_read_the_trunk_from_one_file(wan_bundle):
    graphs = Bundle.open(wan_bundle).manifest.graphs
    assert graphs["level-2"].weights == ("transformer.safetensors",)
    assert graphs["level-4"].weights == ("level-4.safetensors", "transformer.safetensors")
    assert graphs["gate"].weights == ("transformer.safetensors",)
    assert graphs["vae_first_frame"].weights == graphs["vae_next_frames"].weights == ("vae.safetensors",)
