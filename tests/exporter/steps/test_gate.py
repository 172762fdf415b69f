"""The gate graph: the first block's modulated input, and how much it changed."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from ddit.exporter.steps.gate import relative_changes
from ddit.runtime import Bundle
from ddit.runtime.backends.registry import open_backend


@torch.no_grad()
def test_it_is_what_the_first_block_of_diffusers_transformer_sees(tiny_bundle, tiny_pipeline):
    """Caught on its way through the whole transformer, as the pipeline calls it."""
    transformer = FluxTransformer2DModel.from_pretrained(tiny_pipeline / "transformer").eval()
    seen = []
    transformer.transformer_blocks[0].norm1.register_forward_hook(lambda module, given, found: seen.append(found[0]))
    engine = open_backend("cpu", Bundle.open(tiny_bundle)).engine("gate")
    before = np.zeros((2, 4, 3, 32), np.float32)
    pooled, guidance = torch.randn(2, 20), torch.tensor([2.0, 3.5])
    for sigma in (0.9, 0.7):
        latent, timestep = torch.randn(2, 4, 8, 6), torch.full((2,), sigma)
        transformer(
            hidden_states=FluxPipeline._pack_latents(latent, 2, 4, 8, 6),
            timestep=timestep,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=torch.randn(2, 5, 24),
            txt_ids=torch.zeros(5, 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(2, 4, 3, latent.device, latent.dtype),
        )
        arrays = {"latent": latent, "timestep": timestep, "pooled": pooled, "guidance": guidance}
        found = engine.run({**{name: value.numpy() for name, value in arrays.items()}, "gate_input": before})
        np.testing.assert_allclose(found["next_gate_input"].reshape(2, 12, 32), seen[-1], atol=1e-4)
        before = found["next_gate_input"]
    change = [(now - then).abs().mean() / then.abs().mean() for now, then in zip(seen[1], seen[0], strict=True)]
    np.testing.assert_allclose(found["gate_change"], change, rtol=1e-4)


def test_halves_of_the_channels_change_for_themselves():
    before = torch.ones(2, 2, 3, 4)
    modulated = before + torch.tensor([0.1, 0.3, 0.0, -0.4])
    _, whole, low, high = relative_changes(modulated, before)
    torch.testing.assert_close(whole, torch.full((2,), 0.2))
    torch.testing.assert_close(low, torch.full((2,), 0.2))
    torch.testing.assert_close(high, torch.full((2,), 0.2))
    _, _, low, high = relative_changes(before + torch.tensor([1.0, 1.0, 0.0, 0.0]), before)
    assert (low.tolist(), high.tolist()) == ([1.0, 1.0], [0.0, 0.0])


def test_before_a_run_s_first_step_the_change_is_a_number():
    modulated = torch.randn(1, 2, 2, 8)
    assert all(value.isfinite().all() for value in relative_changes(modulated, torch.zeros_like(modulated)))


def test_its_weights_are_the_native_level_s(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest
    assert manifest.graphs["gate"].weights == ("transformer.safetensors",)
    stored = names_in(tiny_bundle / "transformer.safetensors")
    assert {name.removesuffix(".T") for name in stored} == set(
        names_in(next((tiny_bundle.parent / "tiny" / "transformer").glob("*.safetensors")))
    )
    assert len({name.removesuffix(".T") for name in stored}) == len(stored), "a weight would be there twice"


def names_in(path: Path) -> list[str]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [name for name in header if name != "__metadata__"]
