"""Wan 2.1 as diffusers' `WanPipeline` computes it: what the exported graphs are compared with.

Nothing here goes through the modules that are exported, except for their signatures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from numpy.typing import NDArray
from torch import Tensor
from transformers import UMT5EncoderModel

from ddit.exporter.components import load_rounded
from ddit.exporter.graphs.job import Original
from ddit.runtime.bundle.manifest import Dtype

FloatArray = NDArray[np.float32]


def native_velocity(transformer: Any) -> Original:
    """The transformer with its own positions, as the pipeline's denoising loop calls it."""

    def velocity(*, latent: Tensor, timestep: Tensor, context: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        output: Tensor = transformer(
            hidden_states=latent, timestep=timestep * 1000, encoder_hidden_states=context, return_dict=False
        )[0]
        return output

    return velocity


def embedding_change(transformer: Any) -> Original:
    """The timestep's embedding as the transformer makes it, and its relative L1 change as in TeaCache4Wan2.1."""

    def change(now: Tensor, before: Tensor) -> Tensor:
        return torch.stack([(a - b).abs().mean() / b.abs().mean() for a, b in zip(now, before, strict=True)])

    def changes(*, timestep: Tensor, gate_input: Tensor) -> tuple[Tensor, ...]:
        context = gate_input.new_zeros(len(timestep), 1, transformer.config.text_dim)
        now = transformer.condition_embedder(timestep * 1000, context)[0]
        pairs = zip(now.chunk(2, dim=-1), gate_input.chunk(2, dim=-1), strict=True)
        return now, change(now, gate_input), *(change(*pair) for pair in pairs)

    return changes


def text_states(encoder: Any, pad_id: int) -> Original:
    """UMT5 as `WanPipeline._get_t5_prompt_embeds` calls it, for ids that a tokenizer has filled up on the right."""

    def states(*, input_ids: Tensor) -> Tensor:
        lengths = [_length(row, pad_id) for row in input_ids.tolist()]
        mask = torch.zeros_like(input_ids)
        for row, length in enumerate(lengths):
            mask[row, :length] = 1
        found = encoder(input_ids, mask).last_hidden_state
        cut = [one[:length] for one, length in zip(found, lengths, strict=True)]
        filled = [torch.cat([one, one.new_zeros(len(mask[0]) - len(one), one.shape[1])]) for one in cut]
        return torch.stack(filled)

    return states


def _length(ids: list[int], pad_id: int) -> int:
    """How many tokens a tokenizer has filled up; one at least."""
    while len(ids) > 1 and ids[-1] == pad_id:
        ids = ids[:-1]
    return len(ids)


def decoded(vae: Any) -> Original:
    """One turn of the loop in `AutoencoderKLWan._decode`, with the VAE's list of caches before and after it.

    Called without caches it is the first turn. The VAE's list then holds single frames, and a mark where the next turn
    is the first to have one; the graphs have zeros there, with which the VAE's convolutions fill up what is missing.
    """

    def turn(*, latent_frame: Tensor, **caches: Tensor) -> tuple[Tensor, ...]:
        shape = (1, vae.config.z_dim, 1, 1, 1)
        mean, deviation = (
            torch.tensor(values, device=latent_frame.device).view(shape)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        latents = vae.post_quant_conv(latent_frame / (1.0 / deviation) + mean)
        vae.clear_cache()
        remembered: list[Any] = vae._feat_map
        remembered[: len(caches)] = caches.values()
        frames = vae.decoder(latents, feat_cache=remembered, feat_idx=[0], first_chunk=not caches)
        after: list[Tensor] = []
        for one in remembered:
            if isinstance(one, str):
                after.append(torch.zeros_like(after[-1]))
            elif one is not None:  # the list also has places for convolutions that look at one frame only
                after.append(torch.cat([one.new_zeros(one[:, :, : 2 - one.shape[2]].shape), one], dim=2))
        vae.clear_cache()
        return frames, *after

    return turn


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
    """The pipeline, stopped after its first of so many steps: the ``latent`` then, and its frames, the ``image``."""
    pipeline = WanPipeline.from_pretrained(
        folder,
        text_encoder=load_rounded(UMT5EncoderModel, folder / "text_encoder", dtype, device),
        transformer=load_rounded(WanTransformer3DModel, folder / "transformer", dtype, device),
        vae=load_rounded(AutoencoderKLWan, folder / "vae", vae_dtype, device),
    )
    pipeline.set_progress_bar_config(disable=True)
    frames, height, width = latent.shape[2:]
    found: dict[str, FloatArray] = {}

    def stop(pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 0:
            found["latent"] = tensors["latents"].cpu().numpy()
            pipe._interrupt = True
        return tensors

    video: Tensor = pipeline(
        list(prompts),
        height=height * pipeline.vae_scale_factor_spatial,
        width=width * pipeline.vae_scale_factor_spatial,
        num_frames=(frames - 1) * pipeline.vae_scale_factor_temporal + 1,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=torch.from_numpy(latent).to(device),
        max_sequence_length=text_length,
        output_type="pt",
        callback_on_step_end=stop,
        return_dict=False,
    )[0]
    return found | {"image": (2 * video.transpose(1, 2) - 1).cpu().numpy()}
