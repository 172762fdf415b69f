"""FLUX.1 as diffusers' `FluxPipeline` computes it: what the exported graphs are compared with.

Nothing here goes through the modules that are exported, except for their signatures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from ddit.exporter.components import load_rounded
from ddit.exporter.graphs.job import Original
from ddit.runtime.bundle.manifest import Dtype

FloatArray = NDArray[np.float32]


def native_velocity(transformer: Any) -> Original:
    """The transformer on packed latents, with positions from ids, as the pipeline's denoising loop calls it."""

    def velocity(
        *,
        latent: Tensor,
        timestep: Tensor,
        context: Tensor,
        pooled: Tensor,
        guidance: Tensor | None = None,
        rope_cos: Tensor,
        rope_sin: Tensor,
    ) -> Tensor:
        batch, channels, height, width = latent.shape
        rows, columns = height // 2, width // 2
        packed = transformer(
            hidden_states=FluxPipeline._pack_latents(latent, batch, channels, height, width),
            timestep=timestep,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=context,
            txt_ids=torch.zeros(context.shape[1], 3, device=latent.device),
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, rows, columns, latent.device, latent.dtype),
            return_dict=False,
        )[0]
        unpacked: Tensor = FluxPipeline._unpack_latents(packed, height, width, vae_scale_factor=1)
        return unpacked

    return velocity


def first_block_change(transformer: Any) -> Original:
    """The first block's input after its modulated norm, and its relative L1 change as in TeaCache's code for FLUX."""

    def change(now: Tensor, before: Tensor) -> Tensor:
        return torch.stack([(a - b).abs().mean() / b.abs().mean() for a, b in zip(now, before, strict=True)])

    def changes(
        *, latent: Tensor, timestep: Tensor, pooled: Tensor, gate_input: Tensor, guidance: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        batch, channels, height, width = latent.shape
        tokens = transformer.x_embedder(FluxPipeline._pack_latents(latent, batch, channels, height, width))
        numbers = [value * 1000 for value in (timestep, guidance) if value is not None]
        embedding = transformer.time_text_embed(*numbers, pooled)
        modulated = transformer.transformer_blocks[0].norm1(tokens, emb=embedding)[0]
        now = modulated.reshape(gate_input.shape)
        pairs = zip(now.chunk(2, dim=-1), gate_input.chunk(2, dim=-1), strict=True)
        return now, change(now, gate_input), *(change(*pair) for pair in pairs)

    return changes


def pooled_text(encoder: Any) -> Original:
    """CLIP as `FluxPipeline._get_clip_prompt_embeds` calls it."""
    return lambda input_ids: encoder(input_ids, output_hidden_states=False).pooler_output


def text_states(encoder: Any) -> Original:
    """T5 as `FluxPipeline._get_t5_prompt_embeds` calls it."""
    return lambda input_ids: encoder(input_ids, output_hidden_states=False)[0]


def decoded(vae: Any) -> Original:
    """The VAE as the pipeline calls it at the end."""
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    return lambda latent: vae.decode(latent / scale + shift, return_dict=False)[0]


def first_step(
    folder: Path,
    dtype: Dtype,
    vae_dtype: Dtype,
    prompts: Sequence[str],
    latent: FloatArray,
    *,
    steps: int,
    guidance: float,
    text_length: int,
    device: torch.device,
) -> dict[str, FloatArray]:
    """The pipeline, stopped after its first of so many steps: the ``latent`` then, and the ``image`` in [-1, 1]."""
    pipeline = FluxPipeline.from_pretrained(
        folder,
        text_encoder=load_rounded(CLIPTextModel, folder / "text_encoder", dtype, device),
        text_encoder_2=load_rounded(T5EncoderModel, folder / "text_encoder_2", dtype, device),
        transformer=load_rounded(FluxTransformer2DModel, folder / "transformer", dtype, device),
        vae=load_rounded(AutoencoderKL, folder / "vae", vae_dtype, device),
    )
    pipeline.set_progress_bar_config(disable=True)
    batch, channels, height, width = latent.shape
    scale = pipeline.vae_scale_factor
    found: dict[str, FloatArray] = {}

    def stop(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 0:
            unpacked = FluxPipeline._unpack_latents(tensors["latents"], height, width, vae_scale_factor=1)
            found["latent"] = unpacked.cpu().numpy()
            pipe._interrupt = True
        return tensors

    picture: Tensor = pipeline(
        list(prompts),
        height=height * scale,
        width=width * scale,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=FluxPipeline._pack_latents(torch.from_numpy(latent).to(device), batch, channels, height, width),
        max_sequence_length=text_length,
        output_type="pt",
        callback_on_step_end=stop,
        return_dict=False,
    )[0]
    return found | {"image": (2 * picture - 1).cpu().numpy()}
