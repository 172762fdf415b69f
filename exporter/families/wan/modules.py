"""Wan 2.1's transformer at a level, what TeaCache looks at, and UMT5 as its graph sees it."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from ddit.exporter.levels import (
    AdapterConfig,
    Level,
    ResidualPath,
    add_lora,
    resize_embedding,
    resize_head,
    share_parameters,
)
from ddit.exporter.steps.gate import relative_changes

NATIVE_PATCH = 2  # Wan's patches are (1, 2, 2): a level changes their height and width, frames stay single

# ends of layers' dotted names, in every block
FEED_FORWARD = ("ffn.net.0.proj", "ffn.net.2")
ATTENTION = tuple(f"{attn}.{layer}" for attn in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0"))


def patchify(latent: Tensor, patch: int) -> Tensor:
    """Cut ``(B, C, F, H, W)`` into tokens ``(B, F · H/p · W/p, C·p·p)``, frame by frame and row by row."""
    batch, channels, frames, height, width = latent.shape
    grid = latent.reshape(batch, channels, frames, height // patch, patch, width // patch, patch)
    tokens = frames * (height // patch) * (width // patch)
    return grid.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, tokens, channels * patch * patch)


def unpatchify(tokens: Tensor, frames: int, height: int, width: int, patch: int) -> Tensor:
    """Put tokens ``(B, f·h·w, p·p·C)`` of an ``(f, h, w)`` grid back together: ``(B, C, f, h·p, w·p)``.

    Other than in the tokens that go in, the channels lie innermost.
    """
    batch, _, size = tokens.shape
    channels = size // (patch * patch)
    grid = tokens.reshape(batch, frames, height, width, patch, patch, channels)
    return grid.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, channels, frames, height * patch, width * patch)


class AttentionWithTables:
    """diffusers' `WanAttnProcessor` for cosine and sine tables that are handed in, without writing into slices.

    A write into every second number of a tensor would become a scatter in ONNX.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Self-attention with rotary positions, or attention to ``encoder_hidden_states`` (B, L, D) without them."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            values.unflatten(2, (attn.heads, -1))
            for values in (
                attn.norm_q(attn.to_q(hidden_states)),
                attn.norm_k(attn.to_k(source)),
                attn.to_v(source),
            )
        )
        if rotary_emb is not None:
            query, key = (apply_rotary_emb(values, rotary_emb, sequence_dim=1) for values in (query, key))
        query, key, value = (values.transpose(1, 2) for values in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        output: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2, 3))
        return output


class WanLevel(Level):
    """Wan 2.1's transformer reading and writing ``patch``×``patch`` patches of every frame of the latent.

    The parameters of ``transformer`` are shared, not copied. At the native patch nothing is added.
    ``config=None`` at a coarse patch adds the resized embedding and head only.
    """

    def __init__(self, transformer: WanTransformer3DModel, patch: int, config: AdapterConfig | None = None):
        super().__init__()
        self.patch, self.config = patch, config
        self.trunk = share_parameters(transformer)
        self.trunk.set_attn_processor(AttentionWithTables())
        self.dtype = transformer.dtype
        del self.trunk.rope  # its tables end somewhere; ours are inputs
        self.identity: nn.Parameter | None = None
        self.residual: ResidualPath | None = None
        convolution = transformer.patch_embedding
        channels, width = convolution.in_channels, convolution.out_channels
        like = {"device": transformer.device, "dtype": transformer.dtype}
        if patch == NATIVE_PATCH:
            # a convolution whose stride is its kernel is a linear layer over patches
            self.trunk.patch_embedding = linear_embedding(convolution)
            self.embed: nn.Linear = self.trunk.patch_embedding
            self.head: nn.Linear = self.trunk.proj_out
            return

        self.embed = nn.Linear(channels * patch**2, width, **like)
        self.head = nn.Linear(width, transformer.config.out_channels * patch**2, **like)
        del self.trunk.patch_embedding, self.trunk.proj_out
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

    def forward(self, latent: Tensor, timestep: Tensor, context: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        """The velocity at a noise level.

        Args:
            latent: (B, C, F, H, W) float32; H and W are multiples of the patch.
            timestep: (B,) the noise level σ in [0, 1].
            context: (B, L, Dt) UMT5's hidden states, zero where the prompt is filled up.
            rope_cos, rope_sin: (F, H/p, W/p, Dr) from `ddit.runtime.conditioning.positions.rotary_tables`.

        Returns:
            velocity (B, C, F, H, W) float32.
        """
        trunk = self.trunk
        frames, height, width = rope_cos.shape[:3]
        latent = latent.to(self.dtype)
        embedding, modulation, context, _ = trunk.condition_embedder(timestep * 1000, context.to(self.dtype))
        modulation = modulation.unflatten(1, (6, -1))
        rotary = rope_cos.flatten(0, 2), rope_sin.flatten(0, 2)

        tokens = self.embed(patchify(latent, self.patch))
        if self.identity is not None:
            # in place: training keeps the vector in float32, and a sum of both would be float32 too
            tokens += self.identity
        for block in trunk.blocks:
            tokens = self.run_block(block, tokens, context, modulation, rotary)
        shift, scale = (trunk.scale_shift_table + embedding.unsqueeze(1)).chunk(2, dim=1)
        tokens = self.head((trunk.norm_out(tokens.float()) * (1 + scale) + shift).type_as(tokens))

        velocity = unpatchify(tokens, frames, height, width, self.patch)
        if self.residual is not None:
            velocity = velocity + self._correction(latent, velocity, embedding)
        return velocity.float()

    def _correction(self, latent: Tensor, velocity: Tensor, embedding: Tensor) -> Tensor:
        """The residual path on every frame by itself: (B, C, F, H, W) and (B, D) → (B, C, F, H, W)."""
        assert self.residual is not None
        batch, _, frames = latent.shape[:3]
        images = (values.transpose(1, 2).flatten(0, 1) for values in (latent, velocity))
        repeated = embedding[:, None].expand(-1, frames, -1).flatten(0, 1)
        correction: Tensor = self.residual(*images, repeated)
        return correction.reshape(batch, frames, *correction.shape[1:]).transpose(1, 2)


def linear_embedding(convolution: nn.Conv3d) -> nn.Linear:
    """A patch embedding (D, C, 1, p, p) as the linear layer (D, C·p·p) over patches, on the same memory."""
    embed = nn.Linear(1, 1, device="meta")
    embed.weight = nn.Parameter(convolution.weight.detach().flatten(1), requires_grad=convolution.weight.requires_grad)
    assert isinstance(convolution.bias, nn.Parameter)
    embed.bias = convolution.bias
    embed.out_features, embed.in_features = embed.weight.shape
    return embed


def resized_ends(native: Mapping[str, Tensor], patch: int) -> dict[str, Tensor]:
    """A coarse level's embedding and head as they start out, from the native ones in the transformer's state."""
    weight, bias = (_channels_outside(native[f"proj_out.{name}"], NATIVE_PATCH) for name in ("weight", "bias"))
    weight, bias = resize_head(weight, bias, NATIVE_PATCH, patch)
    return {
        "embed.weight": resize_embedding(native["patch_embedding.weight"].flatten(1), NATIVE_PATCH, patch),
        "embed.bias": native["patch_embedding.bias"],
        "head.weight": _channels_inside(weight, patch),
        "head.bias": _channels_inside(bias, patch),
    }


def _channels_outside(head: Tensor, patch: int) -> Tensor:
    """Rows of a head (p·p·C, …), the channels innermost → (C·p·p, …), the channels outermost."""
    return head.reshape(patch * patch, -1, *head.shape[1:]).transpose(0, 1).flatten(0, 1)


def _channels_inside(head: Tensor, patch: int) -> Tensor:
    """The inverse of `_channels_outside`."""
    return head.reshape(-1, patch * patch, *head.shape[1:]).transpose(0, 1).flatten(0, 1)


class WanGate(nn.Module):
    """What TeaCache looks at before a step of Wan 2.1: the timestep's embedding, and its change.

    As in TeaCache4Wan2.1 without ``use_ret_steps``. The parameters of ``transformer`` are shared, not copied.
    """

    def __init__(self, transformer: WanTransformer3DModel):
        super().__init__()
        self.timesteps_proj: Any = transformer.condition_embedder.timesteps_proj
        self.time_embedder: Any = transformer.condition_embedder.time_embedder

    def forward(self, timestep: Tensor, gate_input: Tensor) -> tuple[Tensor, ...]:
        """The embedding and its relative changes (`relative_changes`).

        Args:
            timestep: (B,) the noise level σ in [0, 1].
            gate_input: (B, D) the embedding at the step before.
        """
        return relative_changes(self.time_embedder(self.timesteps_proj(timestep * 1000)), gate_input)


class Umt5Encoder(nn.Module):
    """UMT5's encoder with the mask that `WanPipeline` gives it, and with its zeros where a prompt is filled up."""

    def __init__(self, encoder: Any, pad_id: int):
        super().__init__()
        self.encoder: Any = encoder
        self.pad_id = pad_id

    def forward(self, input_ids: Tensor) -> Tensor:
        """Ids (B, L) → context (B, L, Dt) float32. What follows a row's last token that is not padding is padding."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        # a row of nothing but padding counts as one token: a softmax over nothing has no value
        last = torch.where(input_ids != self.pad_id, positions, 0).amax(dim=1, keepdim=True)
        mask = positions <= last
        states: Tensor = self.encoder(input_ids, attention_mask=mask.long()).last_hidden_state
        return torch.where(mask[..., None], states.float(), 0.0)
