"""FLUX.1's transformer at a level, and the models around it as their graphs see them."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from ddit.exporter.levels import (
    AdapterConfig,
    Level,
    ResidualPath,
    add_lora,
    patchify,
    resize_embedding,
    resize_head,
    share_parameters,
    unpatchify,
)
from ddit.exporter.steps.gate import relative_changes

NATIVE_PATCH = 2  # diffusers packs 2×2 latent pixels into one token before the transformer sees them

# ends of layers' dotted names, in the double blocks (both streams) and the single blocks
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")
ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)


class FluxLevel(Level):
    """FLUX.1's transformer reading and writing ``patch``×``patch`` patches of the latent.

    The parameters of ``transformer`` are shared, not copied. At the native patch nothing is added, and the velocity is
    bit for bit the base model's. ``config=None`` at a coarse patch adds the resized embedding and head only.
    """

    def __init__(self, transformer: FluxTransformer2DModel, patch: int, config: AdapterConfig | None = None):
        super().__init__()
        self.patch, self.config = patch, config
        self.trunk = share_parameters(transformer)
        self.dtype = transformer.dtype
        self.embed: nn.Linear = self.trunk.x_embedder
        self.head: nn.Linear = self.trunk.proj_out
        self.identity: nn.Parameter | None = None
        self.residual: ResidualPath | None = None
        if patch == NATIVE_PATCH:
            return

        channels, width = transformer.config.in_channels // NATIVE_PATCH**2, transformer.inner_dim
        like = {"device": transformer.device, "dtype": transformer.dtype}
        self.embed = nn.Linear(channels * patch**2, width, **like)
        self.head = nn.Linear(width, channels * patch**2, **like)
        del self.trunk.x_embedder, self.trunk.proj_out
        if transformer.device.type != "meta":
            self.load_state_dict(resized_ends(transformer.state_dict(), patch), strict=False)
        if config is None:
            return
        if config.identity:
            self.identity = nn.Parameter(torch.zeros(width, **like))
        if config.residual_width:
            self.residual = ResidualPath(channels, config.residual_width, width, **like)
        if config.rank:
            add_lora(self.trunk, config.targets, config.rank, config.alpha)

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        context: Tensor,
        pooled: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The velocity at a noise level.

        Args:
            latent: (B, C, H, W) float32; H and W are multiples of the patch.
            timestep: (B,) the noise level σ in [0, 1].
            context: (B, L, Dc) T5's hidden states.
            pooled: (B, Dp) CLIP's pooled output.
            rope_cos, rope_sin: (H/p, W/p, Dr) from `ddit.runtime.conditioning.positions.rotary_tables`.
            guidance: (B,) guidance scale; None for a model without guidance embedding.

        Returns:
            velocity (B, C, H, W) float32.
        """
        trunk = self.trunk
        height, width = rope_cos.shape[0], rope_cos.shape[1]
        latent = latent.to(self.dtype)
        pooled = pooled.to(self.dtype)
        context = trunk.context_embedder(context.to(self.dtype))

        # float32 up to the sinusoids: diffusers rounds these to the model's dtype first, where bfloat16 knows σ = 0.700
        # to 0.4 % only and every engine would round in another place
        time = timestep * 1000
        scale = () if guidance is None else (guidance * 1000,)
        embedding = trunk.time_text_embed(time, *scale, pooled)

        # text tokens all sit at position 0: cosine 1, sine 0
        text = (context.shape[1], rope_cos.shape[2])
        rotary = (
            torch.cat([rope_cos.new_ones(text), rope_cos.flatten(0, 1)]),
            torch.cat([rope_sin.new_zeros(text), rope_sin.flatten(0, 1)]),
        )

        tokens = self.embed(patchify(latent, self.patch))
        if self.identity is not None:
            # in place: training keeps the vector in float32, and a sum of both would be float32 too
            tokens += self.identity
        for block in trunk.transformer_blocks:
            context, tokens = self.run_block(block, tokens, context, embedding, rotary)
        for block in trunk.single_transformer_blocks:
            context, tokens = self.run_block(block, tokens, context, embedding, rotary)
        tokens = self.head(trunk.norm_out(tokens, embedding))

        velocity = unpatchify(tokens, height, width, self.patch)
        if self.residual is not None:
            velocity = velocity + self.residual(latent, velocity, embedding)
        return velocity.float()


class FluxGate(nn.Module):
    """What TeaCache looks at before a step: the first block's modulated input at the native patch, and its change.

    The parameters of ``transformer`` are shared, not copied.
    """

    def __init__(self, transformer: FluxTransformer2DModel):
        super().__init__()
        self.dtype = transformer.dtype
        self.x_embedder: nn.Linear = transformer.x_embedder
        self.time_text_embed: Any = transformer.time_text_embed
        self.norm: Any = transformer.transformer_blocks[0].norm1

    def forward(
        self, latent: Tensor, timestep: Tensor, pooled: Tensor, gate_input: Tensor, guidance: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The modulated input and its relative changes (`relative_changes`); the arguments are those of `FluxLevel`."""
        height, width = latent.shape[2] // NATIVE_PATCH, latent.shape[3] // NATIVE_PATCH
        # in float32 up to the sinusoids, as in `FluxLevel`
        scale = () if guidance is None else (guidance * 1000,)
        embedding = self.time_text_embed(timestep * 1000, *scale, pooled.to(self.dtype))
        tokens = self.x_embedder(patchify(latent.to(self.dtype), NATIVE_PATCH))
        modulated: Tensor = self.norm(tokens, emb=embedding)[0]
        return relative_changes(modulated.reshape(-1, height, width, modulated.shape[-1]).float(), gate_input)


def resized_ends(native: Mapping[str, Tensor], patch: int) -> dict[str, Tensor]:
    """A coarse level's embedding and head as they start out, from the native ones in the transformer's state."""
    weight, bias = resize_head(native["proj_out.weight"], native["proj_out.bias"], NATIVE_PATCH, patch)
    return {
        "embed.weight": resize_embedding(native["x_embedder.weight"], NATIVE_PATCH, patch),
        "embed.bias": native["x_embedder.bias"],
        "head.weight": weight,
        "head.bias": bias,
    }


class ClipEncoder(nn.Module):
    """CLIP's text encoder, down to the pooled vector that FLUX takes."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder: Any = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids (B, T) → pooled (B, Dp) float32."""
        pooled: Tensor = self.encoder(input_ids).pooler_output
        return pooled.float()


class T5Encoder(nn.Module):
    """T5's encoder. FLUX masks nothing: padding tokens are attended to, as in training."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.encoder: Any = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids (B, L) → context (B, L, Dc) float32."""
        context: Tensor = self.encoder(input_ids)[0]
        return context.float()


class VaeDecoder(nn.Module):
    """The VAE's way from a latent to a picture, with the latent's scale and shift."""

    def __init__(self, vae: Any):
        super().__init__()
        self.post_quant_conv: Any = vae.post_quant_conv  # None where the VAE has none
        self.decoder: Any = vae.decoder
        self.scale: float = vae.config.scaling_factor
        self.shift: float = vae.config.shift_factor or 0.0
        self.dtype: torch.dtype = vae.dtype

    def forward(self, latent: Tensor) -> Tensor:
        """Latent (B, C, H, W) → picture (B, 3, 8H, 8W) in [-1, 1], float32."""
        unscaled = (latent / self.scale + self.shift).to(self.dtype)
        if self.post_quant_conv is not None:
            unscaled = self.post_quant_conv(unscaled)
        picture: Tensor = self.decoder(unscaled)
        return picture.float()
