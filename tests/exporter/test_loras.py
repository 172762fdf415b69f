"""LoRAs that are merged before an export, beside diffusers with the same LoRAs loaded."""

import copy

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import run
from ddit.exporter.cli import main
from ddit.exporter.loras import Lora, with_loras
from ddit.exporter.models import find_model
from ddit.runtime.bundle import read_manifest
from ddit.runtime.errors import ModelError, UsageError

TARGETS = ["attn.to_q", "attn.to_k", "attn.to_out.0", "ff.net.2", "proj_mlp", "norm1.linear", "x_embedder"]


@pytest.fixture(scope="module")
def trained(tiny_pipeline, tmp_path_factory):
    """A LoRA file as peft and diffusers write it, with an alpha that is not the rank."""
    transformer = FluxTransformer2DModel.from_pretrained(tiny_pipeline / "transformer")
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False))
    folder = tmp_path_factory.mktemp("lora")
    layers = get_peft_model_state_dict(transformer)
    config = transformer.peft_config["default"].to_dict()
    FluxPipeline.save_lora_weights(
        folder, layers, transformer_lora_adapter_metadata=config, weight_name="style.safetensors"
    )
    return folder / "style.safetensors"


@pytest.fixture(scope="module")
def kohya(tiny_pipeline, tmp_path_factory):
    """A LoRA file by the names of kohya's trainer: one pair for queries, keys and values, and an alpha a layer."""
    path = tmp_path_factory.mktemp("kohya") / "kohya.safetensors"
    torch.manual_seed(1)
    width, hidden = 32, 128  # of the tiny transformer and its feed-forward layers
    layers = {
        "double_blocks_0_img_attn_qkv": (width, 3 * width),
        "double_blocks_0_txt_mlp_0": (width, hidden),
        "single_blocks_1_linear2": (width + hidden, width),
    }
    tensors = {}
    for name, (wide, high) in layers.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, wide) * 0.2
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(high, 4) * 0.2
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


def velocity(transformer: FluxTransformer2DModel) -> torch.Tensor:
    torch.manual_seed(0)
    size = transformer.config
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(1, 16, size.in_channels),
            encoder_hidden_states=torch.randn(1, 5, size.joint_attention_dim),
            pooled_projections=torch.randn(1, size.pooled_projection_dim),
            timestep=torch.tensor([0.4]),
            guidance=torch.tensor([3.5]),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(5, 3),
        ).sample


@pytest.mark.parametrize("files", [["peft"], ["kohya"], ["peft", "kohya"]], ids=" and ".join)
def test_merged_is_what_diffusers_computes(tiny_pipeline, trained, kohya, tmp_path, files):
    scales = {"peft": 0.8, "kohya": 1.5}
    paths = {"peft": trained, "kohya": kohya}
    pipeline = FluxPipeline.from_pretrained(tiny_pipeline)
    plain = velocity(copy.deepcopy(pipeline.transformer))
    for name in files:
        pipeline.load_lora_weights(str(paths[name]), adapter_name=name)
    pipeline.set_adapters(files, [scales[name] for name in files])
    wanted = velocity(pipeline.transformer)
    chosen = [Lora(paths[name], scales[name]) for name in files]
    with with_loras(find_model(str(tiny_pipeline)), chosen, tmp_path) as source:
        found = velocity(FluxTransformer2DModel.from_pretrained(source.folder / "transformer"))
        assert source.info.id == f"tiny with {', '.join(map(str, chosen))}"
        assert (source.folder / "vae").is_symlink()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert (found - plain).abs().max() > 0.01
    assert not [*tmp_path.iterdir()]


def test_without_one_nothing_is_written(tiny_pipeline, tmp_path):
    source = find_model(str(tiny_pipeline))
    with with_loras(source, [], tmp_path) as same:
        assert same is source


def test_scales_in_writing(trained):
    assert Lora.parse(f"{trained}:0.8") == Lora(trained, 0.8)
    assert Lora.parse(str(trained)) == Lora(trained, 1.0)
    for text in ("none.safetensors", f"{trained}:nan", f"{trained}:x", str(trained.parent)):
        with pytest.raises(UsageError):
            Lora.parse(text)


def pair(layer: str) -> dict[str, torch.Tensor]:
    name = f"transformer.{layer}.lora"
    return {f"{name}_A.weight": torch.zeros(2, 3), f"{name}_B.weight": torch.zeros(3, 2)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": torch.zeros(2)}, "more than a LoRA of linear layers"),
        ({"transformer.x_embedder.lora_A.weight": torch.zeros(2, 3)}, "more than a LoRA of linear layers"),
        ({"transformer.x_embedder.lora_magnitude_vector": torch.zeros(3)}, "DoRA"),
        (pair("nothing"), "has no tensor 'nothing.weight'"),
        (pair("x_embedder"), "of shape (32, 16) by (3, 3)"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_pipeline, tmp_path, tensors, message):
    path = tmp_path / "odd.safetensors"
    save_file(tensors, path)
    with pytest.raises(ModelError) as error, with_loras(find_model(str(tiny_pipeline)), [Lora(path)], tmp_path):
        pass
    assert message in str(error.value)


def test_an_export_with_one(tiny_pipeline, trained, tmp_path):
    out = tmp_path / "styled.bundle"
    options = ("--levels", "2", "--dtype", "fp32", "--profile", "256", "--lora", f"{trained}:0.8", "--out", out)
    result = run(main, "flux", "--model", tiny_pipeline, *options)
    assert result.exit_code == 0, result.stderr
    manifest = read_manifest(out)
    assert manifest.model.id == "tiny with style.safetensors:0.8"
    assert [*tmp_path.iterdir()] == [out]
    with safe_open(out / "transformer.safetensors", framework="pt") as merged:
        found = merged.get_tensor("x_embedder.weight.T").T
    layers = load_file(trained)
    change = layers["transformer.x_embedder.lora_B.weight"] @ layers["transformer.x_embedder.lora_A.weight"]
    base = load_file(tiny_pipeline / "transformer" / "diffusion_pytorch_model.safetensors")["x_embedder.weight"]
    torch.testing.assert_close(found, base + 0.8 * 6 / 4 * change)
