"""Levels: resizing is exact where it can be, the trunk is shared, and the native level is the base model."""

import copy

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from ddit.exporter.families.flux.model import rotary_positions
from ddit.exporter.families.flux.modules import FluxLevel
from ddit.exporter.levels import (
    bilinear_matrix,
    patchify,
    resize_embedding,
    resize_head,
    unpatchify,
)
from ddit.runtime.conditioning.positions import rotary_tables
from tiny import CHANNELS, tiny_adapter_config, tiny_transformer

POSITIONS = rotary_positions((4, 6, 6))
PATCHES = st.sampled_from([4, 6, 8])


def test_pseudo_inverse_of_two_to_four_is_the_known_one():
    line = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]], dtype=torch.float64)
    assert torch.allclose(bilinear_matrix(2, 4), torch.kron(line, line))
    known = torch.tensor([[0.65, 0.45, 0.05, -0.15], [-0.15, 0.05, 0.45, 0.65]], dtype=torch.float64)
    assert torch.allclose(torch.linalg.pinv(bilinear_matrix(2, 4)), torch.kron(known, known))


@given(patch=PATCHES, channels=st.integers(1, 5), width=st.integers(1, 7))
@settings(deadline=None, max_examples=25)
def test_resized_embedding_is_exact_for_upsampled_patches(patch, channels, width):
    weight = torch.randn(width, channels * 4, dtype=torch.float64)
    small = torch.randn(3, channels, 4, dtype=torch.float64)
    large = small @ bilinear_matrix(2, patch).T
    expected = small.flatten(1) @ weight.T
    assert torch.allclose(large.flatten(1) @ resize_embedding(weight, 2, patch).T, expected)


@given(patch=PATCHES, channels=st.integers(1, 5))
@settings(deadline=None, max_examples=25)
def test_resized_head_is_the_native_head_and_then_upsampling(patch, channels):
    weight, bias = torch.randn(channels * 4, 7, dtype=torch.float64), torch.randn(channels * 4, dtype=torch.float64)
    hidden = torch.randn(3, 7, dtype=torch.float64)
    native = (hidden @ weight.T + bias).unflatten(1, (channels, 2, 2))
    upsampled = torch.nn.functional.interpolate(native, size=(patch, patch), mode="bilinear", align_corners=False)
    new_weight, new_bias = resize_head(weight, bias, 2, patch)
    assert torch.allclose(hidden @ new_weight.T + new_bias, upsampled.flatten(1))


@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=PATCHES,
    channels=st.integers(1, 3),
)
@settings(deadline=None, max_examples=25)
def test_patches_put_back_together_are_the_latent(batch, rows, columns, patch, channels):
    latent = torch.randn(batch, channels, rows * patch, columns * patch)
    tokens = patchify(latent, patch)
    assert tokens.shape == (batch, rows * columns, channels * patch * patch)
    assert torch.equal(unpatchify(tokens, rows, columns, patch), latent)


def level_inputs(patch: int, height: int = 16, width: int = 24, batch: int = 2, text: int = 5):
    cos, sin = rotary_tables(POSITIONS, {"height": height // patch, "width": width // patch}, patch / 2)
    return {
        "latent": torch.randn(batch, CHANNELS, height, width),
        "timestep": torch.rand(batch),
        "guidance": torch.full((batch,), 3.5),
        "context": torch.randn(batch, text, 24),
        "pooled": torch.randn(batch, 20),
        "rope_cos": torch.from_numpy(cos),
        "rope_sin": torch.from_numpy(sin),
    }


def diffusers_velocity(transformer, inputs):
    """What diffusers' transformer gives, called as `FluxPipeline` calls it."""
    latent = inputs["latent"].to(transformer.dtype)
    batch, _, height, width = latent.shape
    tokens = transformer(
        hidden_states=FluxPipeline._pack_latents(latent, batch, CHANNELS, height, width),
        encoder_hidden_states=inputs["context"].to(transformer.dtype),
        pooled_projections=inputs["pooled"].to(transformer.dtype),
        timestep=inputs["timestep"],
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32),
        txt_ids=torch.zeros(5, 3),
        guidance=inputs["guidance"],
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(tokens, height * 8, width * 8, 8)


@pytest.mark.parametrize("guidance", [True, False])
@torch.no_grad()
def test_native_level_is_bit_for_bit_the_base_model(guidance):
    transformer = tiny_transformer(guidance=guidance)
    inputs = level_inputs(2)
    if not guidance:
        inputs["guidance"] = None
    assert torch.equal(FluxLevel(transformer, 2)(**inputs), diffusers_velocity(transformer, inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_in_half_precision_the_native_level_is_nearer_to_float32_than_diffusers(dtype):
    """diffusers rounds the noise level and the guidance scale to the model's type, the level keeps them in float32."""
    exact = tiny_transformer().to(dtype).float()  # the same rounded weights on every side
    half = copy.deepcopy(exact).to(dtype)
    errors = []
    for _ in range(8):
        inputs = level_inputs(2)
        expected = diffusers_velocity(exact, inputs)
        sides = FluxLevel(half, 2)(**inputs), diffusers_velocity(half, inputs).float()
        errors.append([((side - expected).norm() / expected.norm()).item() for side in sides])
    ours, theirs = np.median(errors, axis=0)
    print(f"{dtype}: relative error of the level {ours:.2%}, of diffusers {theirs:.2%}")
    assert ours < theirs


def test_a_level_shares_the_trunk_and_freezes_nothing_of_its_own():
    transformer = tiny_transformer()
    level = FluxLevel(transformer, 4, tiny_adapter_config(rank=4, residual_width=8))
    shared = {id(parameter) for parameter in transformer.parameters()}
    own = level.own_parameters()
    assert not shared & {id(parameter) for parameter in own.values()}
    assert {id(p) for p in level.parameters()} - {id(p) for p in own.values()} <= shared
    assert not FluxLevel(transformer, 2).own_parameters()
    # every feed-forward layer got its branch: four in a double block, two in a single one
    assert sum(name.endswith("lora_A.weight") for name in own) == 4 * 1 + 2 * 2


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing():
    transformer = tiny_transformer()
    inputs = level_inputs(4)
    plain = FluxLevel(transformer, 4)(**inputs)
    assert torch.equal(FluxLevel(transformer, 4, tiny_adapter_config(rank=4, residual_width=8))(**inputs), plain)


def test_every_adapter_parameter_learns_within_two_steps():
    """LoRA's A and the residual path's first layers wait for one step behind a zero layer, never for two."""
    transformer = tiny_transformer().requires_grad_(False)
    level = FluxLevel(transformer, 4, tiny_adapter_config(rank=4, residual_width=8))
    own = level.own_parameters()
    for parameter in own.values():
        parameter.requires_grad_(True)
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    optimizer = torch.optim.SGD(own.values(), lr=0.1)
    for _ in range(2):
        inputs = level_inputs(4)
        level(**inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [name for name in own if torch.equal(own[name], before[name])] == []


@given(rows=st.integers(1, 6), columns=st.integers(1, 6))
@settings(deadline=None, max_examples=25)
def test_native_rotary_tables_are_those_of_diffusers(rows, columns):
    ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, "cpu", torch.float32)
    cos, sin = tiny_transformer().pos_embed(ids)
    own_cos, own_sin = rotary_tables(POSITIONS, {"height": rows, "width": columns}, 1.0)
    np.testing.assert_allclose(own_cos.reshape(-1, 16), cos, atol=1e-7)
    np.testing.assert_allclose(own_sin.reshape(-1, 16), sin, atol=1e-7)


def test_a_coarse_patch_sits_at_the_centre_of_the_native_ones():
    from ddit.runtime.conditioning.positions import patch_centres

    assert patch_centres(2, 2.0).tolist() == [0.5, 2.5]
    assert patch_centres(2, 4.0).tolist() == [1.5, 5.5]
