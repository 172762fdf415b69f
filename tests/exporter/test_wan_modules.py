"""Wan's modules against diffusers: the transformer, UMT5, the gate, and the decoder frame by frame."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddit.exporter.components import keep_float32
from ddit.exporter.families.wan import original
from ddit.exporter.families.wan.decoder import FirstFrame, NextFrames
from ddit.exporter.families.wan.modules import (
    NATIVE_PATCH,
    Umt5Encoder,
    WanGate,
    WanLevel,
    patchify,
    resized_ends,
    unpatchify,
)
from tiny_wan import CHANNELS, TEXT_WIDTH, tiny_adapter_config, tiny_pipeline, tiny_transformer, tiny_vae

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def level_inputs(transformer, patch=NATIVE_PATCH, frames=3, height=16, width=24, batch=2):
    """Inputs of a level; the tables are diffusers' own for the native level, picked apart for the others."""
    latent = torch.randn(batch, CHANNELS, frames, height, width)
    step = patch // NATIVE_PATCH
    grid = (frames, height // NATIVE_PATCH, width // NATIVE_PATCH)
    cos, sin = (table.reshape(*grid, -1)[:, ::step, ::step] for table in transformer.rope(latent))
    return {
        "latent": latent,
        "timestep": torch.rand(batch),
        "context": torch.randn(batch, 7, TEXT_WIDTH),
        "rope_cos": cos,
        "rope_sin": sin,
    }


@pytest.mark.parametrize("frames", [1, 3])
def test_the_native_level_is_the_base_model(frames):
    transformer = tiny_transformer()
    inputs = level_inputs(transformer, frames=frames)
    level = WanLevel(transformer, NATIVE_PATCH)
    torch.testing.assert_close(level(**inputs), original.native_velocity(transformer)(**inputs), rtol=0, atol=1e-5)
    assert not level.own_parameters()


def test_the_base_model_stays_as_it_was():
    transformer = tiny_transformer()
    inputs = level_inputs(transformer)
    before = original.native_velocity(transformer)(**inputs)
    for patch in (2, 4):
        WanLevel(transformer, patch, tiny_adapter_config(rank=4))
    assert torch.equal(original.native_velocity(transformer)(**inputs), before)


@pytest.mark.parametrize("patch", [4, 8])
def test_a_coarse_level_shares_the_trunk_and_starts_at_the_resized_base_model(patch):
    transformer = tiny_transformer()
    inputs = level_inputs(transformer, patch)
    plain = WanLevel(transformer, patch)
    level = WanLevel(transformer, patch, tiny_adapter_config(rank=4, residual_width=8))
    assert torch.equal(level(**inputs), plain(**inputs))
    assert plain(**inputs).shape == inputs["latent"].shape
    own = level.own_parameters()
    shared = {id(parameter) for parameter in transformer.parameters()}
    assert {id(parameter) for parameter in level.parameters()} - {id(parameter) for parameter in own.values()} <= shared
    assert sum(name.endswith("lora_A.weight") for name in own) == 2 * len(transformer.blocks)


@pytest.mark.parametrize("patch", [4, 8])
def test_embedding_an_upsampled_patch_is_embedding_the_patch(patch):
    transformer = tiny_transformer()
    latent = torch.randn(2, CHANNELS, 3, 2, 2)
    larger = F.interpolate(latent.transpose(1, 2).flatten(0, 1), size=(patch, patch), mode="bilinear")
    larger = larger.unflatten(0, (2, 3)).transpose(1, 2)
    expected = transformer.patch_embedding(latent).flatten(2).transpose(1, 2)
    actual = WanLevel(transformer, patch).embed(patchify(larger, patch))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("patch", [4, 8])
def test_a_coarse_head_is_the_native_head_and_then_upsampling(patch):
    """Every token's patch by itself, as diffusers puts it together."""
    transformer = tiny_transformer()
    ends = resized_ends(transformer.state_dict(), patch)
    hidden = torch.randn(1, 1, transformer.proj_out.in_features)
    native = transformer.proj_out(hidden).reshape(1, 1, 1, 1, 1, 2, 2, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
    native = native.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    expected = F.interpolate(native[:, :, 0], size=(patch, patch), mode="bilinear")
    coarse = F.linear(hidden, ends["head.weight"], ends["head.bias"])
    torch.testing.assert_close(unpatchify(coarse, 1, 1, 1, patch)[:, :, 0], expected, rtol=0, atol=1e-5)


@given(
    frames=st.integers(1, 3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    patch=st.sampled_from([2, 4, 6]),
)
@settings(deadline=None, max_examples=25)
def test_tokens_are_those_of_a_convolution_and_of_diffusers(frames, rows, columns, patch):
    latent = torch.randn(2, 3, frames, rows * patch, columns * patch)
    convolution = nn.Conv3d(3, 5, (1, patch, patch), (1, patch, patch))
    expected = convolution(latent).flatten(2).transpose(1, 2)
    tokens = patchify(latent, patch)
    torch.testing.assert_close(F.linear(tokens, convolution.weight.flatten(1), convolution.bias), expected)
    inside = tokens.unflatten(2, (3, -1)).transpose(2, 3).flatten(2)
    assert torch.equal(unpatchify(inside, frames, rows, columns, patch), latent)


def test_the_residual_path_works_on_every_frame_by_itself():
    transformer = tiny_transformer()
    level = WanLevel(transformer, 4, tiny_adapter_config(rank=0, residual_width=8, identity=False))
    inputs = level_inputs(transformer, 4)
    plain = level(**inputs)
    level.residual.conv_out.weight.normal_()
    embedding = transformer.condition_embedder(inputs["timestep"] * 1000, inputs["context"])[0]
    actual = level(**inputs) - plain
    for frame in range(3):
        correction = level.residual(inputs["latent"][:, :, frame], plain[:, :, frame], embedding)
        torch.testing.assert_close(actual[:, :, frame], correction, rtol=0, atol=1e-4)


def test_every_adapter_parameter_learns_within_two_steps():
    transformer = tiny_transformer().requires_grad_(False)
    level = WanLevel(transformer, 4, tiny_adapter_config(rank=4, residual_width=8))
    own = level.own_parameters()
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    with torch.enable_grad():
        for parameter in own.values():
            parameter.requires_grad_(True)
        optimizer = torch.optim.SGD(own.values(), lr=0.1)
        for _ in range(2):
            level(**level_inputs(transformer, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [name for name in own if torch.equal(own[name], before[name])] == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_what_diffusers_keeps(tmp_path, dtype):
    transformer = tiny_transformer()
    transformer.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    kept = keep_float32(tiny_transformer(), WanTransformer3DModel._keep_in_fp32_modules, dtype)
    types = {name: parameter.dtype for name, parameter in kept.named_parameters()}
    assert types == {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    assert set(types.values()) == {dtype, torch.float32}
    inputs = level_inputs(transformer)
    rounded = {**inputs, "latent": inputs["latent"].to(dtype), "context": inputs["context"].to(dtype)}
    actual, expected = WanLevel(loaded, 2)(**inputs), original.native_velocity(loaded)(**rounded).float()
    assert (actual - expected).norm() < 0.01 * expected.norm()


def test_the_gate_sees_the_timestep_s_embedding():
    transformer = tiny_transformer()
    timestep = torch.tensor([0.9, 0.3])
    before = torch.randn(2, transformer.proj_out.in_features)
    expected = original.embedding_change(transformer)(timestep=timestep, gate_input=before)
    for one, other in zip(WanGate(transformer)(timestep, before), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert torch.equal(WanGate(transformer)(timestep, expected[0])[1], torch.zeros(2))


PROMPTS = ("a red circle", "", "two small squares on the left right striped plain noisy background large blue green")


@pytest.mark.parametrize("length", [12, 40])
def test_the_encoder_is_the_pipeline_s(length):
    """Prompts that are short, empty and longer than there is room."""
    pipeline = tiny_pipeline()
    expected = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False, max_sequence_length=length)[0]
    ids = pipeline.tokenizer(
        list(PROMPTS), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    pad = pipeline.tokenizer.pad_token_id
    actual = Umt5Encoder(pipeline.text_encoder, pad)(ids)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(original.text_states(pipeline.text_encoder, pad)(input_ids=ids), expected)
    assert not expected[1, 1:].any()


def test_a_row_of_padding_is_one_token():
    pipeline = tiny_pipeline()
    states = Umt5Encoder(pipeline.text_encoder, 0)(torch.zeros(1, 5, dtype=torch.int64))
    assert states[0, 0].isfinite().all()
    assert not states[0, 1:].any()


def scaled(vae, latent):
    """The latent as `WanPipeline` hands it to the VAE."""
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return latent / (1.0 / deviation) + mean


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_the_decoder_is_diffusers_frame_by_frame(frames):
    vae = tiny_vae()
    latent = torch.randn(2, CHANNELS, frames, 4, 6)
    expected = vae.decode(scaled(vae, latent), return_dict=False)[0]
    first, further = FirstFrame(vae), NextFrames(vae)
    clip, *caches = first(latent[:, :, :1])
    parts = [clip]
    for frame in range(1, frames):
        clip, *caches = further(latent[:, :, frame : frame + 1], *caches)
        parts.append(clip)
    assert [part.shape[2] for part in parts] == [1, *[4] * (frames - 1)]
    torch.testing.assert_close(torch.cat(parts, dim=2).clamp(-1, 1), expected, rtol=0, atol=1e-6)


def test_caches_have_the_shapes_that_are_said():
    vae = tiny_vae()
    first, further = FirstFrame(vae), NextFrames(vae)
    frame = torch.randn(2, CHANNELS, 1, 3, 5)
    _, *caches = first(frame)
    shapes = [(2, channels, 2, 3 * scale, 5 * scale) for channels, scale in first.caches]
    assert [tuple(cache.shape) for cache in caches] == shapes
    assert [tuple(cache.shape) for cache in further(frame, *caches)[1:]] == shapes
    # as many as the VAE's own list has in use
    vae.decode(torch.randn(1, CHANNELS, 2, 2, 2))
    vae.clear_cache()
    used: list = vae._feat_map
    vae.decoder(frame, feat_cache=used, feat_idx=[0], first_chunk=True)
    assert len(caches) == sum(one is not None for one in used)


def test_decoding_a_turn_is_what_the_original_does():
    """The original's side of the parity gate: two turns of diffusers' loop make diffusers' clip."""
    vae = tiny_vae()
    latent = torch.randn(2, CHANNELS, 2, 4, 6)
    turn = original.decoded(vae)
    one, *caches = turn(latent_frame=latent[:, :, :1])
    two, *_ = turn(latent_frame=latent[:, :, 1:], **{f"cache_{k}": cache for k, cache in enumerate(caches)})
    expected = vae.decode(scaled(vae, latent), return_dict=False)[0]
    torch.testing.assert_close(torch.cat([one, two], dim=2).clamp(-1, 1), expected, rtol=0, atol=1e-6)
    for own, other in zip(FirstFrame(vae)(latent[:, :, :1])[1:], caches, strict=True):
        torch.testing.assert_close(own, other)
