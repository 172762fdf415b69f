"""The video demo's parts: a small Wan 2.1 pipeline for clips, before training."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from ddit.exporter.families.wan.decoder import cache_shapes
from ddit.exporter.families.wan.model import rotary_positions
from ddit.exporter.families.wan.modules import NATIVE_PATCH
from ddit.runtime.bundle.manifest import AxisInfo, LatentInfo, UniPCInfo
from demo_model.parts import make_umt5
from demo_video.clips import vocabulary
from training.distillation import Tables, level_tables

TEXT_LENGTH = 24  # the longest caption has 20 tokens, the end included
STEPS = 50  # of sampling
SHIFT = 3.0  # of noise levels, Wan 2.1's at 480p: σ → s σ / (1 + (s − 1) σ)
FRAMES_OF_LATENT, SIDE_OF_LATENT = 4, 8  # frames, and pixels along a side, of a latent frame and pixel
TRAIN_STEPS = 1000  # that the transformer's timestep counts


@dataclass(frozen=True)
class Sizes:
    """Widths and depths. The defaults make the video demo: 9.7 million parameters in the transformer."""

    side: int = 128  # pixels
    frames: int = 17
    vae: int = 16  # channels at full size; up to four times as many in the middle
    latent_channels: int = 16
    text_width: int = 128
    text_layers: int = 2
    heads: int = 4
    head_dim: int = 64
    layers: int = 8

    @property
    def latent_frames(self) -> int:
        """Frames of a latent."""
        return 1 + (self.frames - 1) // FRAMES_OF_LATENT

    @property
    def latent(self) -> tuple[int, int, int, int]:
        """A latent's shape: channels, frames, height, width."""
        side = self.side // SIDE_OF_LATENT
        return self.latent_channels, self.latent_frames, side, side

    @property
    def tokens(self) -> int:
        """Tokens of a clip at the native level."""
        _, frames, height, width = self.latent
        return frames * (height // NATIVE_PATCH) * (width // NATIVE_PATCH)


TINY = Sizes(64, 9, 4, 4, 32, 1, 2, 16, 1)  # a smoke test's


def make_vae(sizes: Sizes) -> AutoencoderKLWan:
    """Wan 2.1's VAE with fewer channels, and one residual block where that has two.

    It begins as a chain of convolutions that keep a signal's variance, with residual blocks that add nothing yet.
    torch's own initial weights let the signal fade, and the first 450 steps of training learned nothing.
    """
    vae = AutoencoderKLWan(base_dim=sizes.vae, z_dim=sizes.latent_channels, num_res_blocks=1)
    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    for name, layer in vae.named_modules():
        if name.endswith("conv2"):  # the last of a residual block
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
    return vae


def make_transformer(sizes: Sizes) -> WanTransformer3DModel:
    """Wan 2.1's architecture, small."""
    width = sizes.heads * sizes.head_dim
    transformer = WanTransformer3DModel(
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        text_dim=sizes.text_width,
        freq_dim=256,
        ffn_dim=4 * width,
        num_layers=sizes.layers,
    )
    for parameter in transformer.proj_out.parameters():  # the untrained model then predicts 0, as DiT's does
        nn.init.zeros_(parameter)
    return transformer


def make_text_encoder(sizes: Sizes) -> tuple[UMT5EncoderModel, PreTrainedTokenizerFast]:
    """A UMT5 encoder and its tokenizer over the captions' words."""
    return make_umt5(sizes.text_width, sizes.text_layers, vocabulary(), TEXT_LENGTH)


def make_scheduler() -> UniPCMultistepScheduler:
    """Wan 2.1's scheduler."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)


def sampler_info() -> UniPCInfo:
    """That scheduler, as a bundle describes it."""
    config = make_scheduler().config
    return UniPCInfo(shift=config.flow_shift, order=config.solver_order, train_steps=TRAIN_STEPS, steps=STEPS)


def make_tables(sizes: Sizes, device: torch.device) -> Tables:
    """The levels' position tables."""
    downscales = {"frames": FRAMES_OF_LATENT, "height": SIDE_OF_LATENT, "width": SIDE_OF_LATENT}
    axes = tuple(AxisInfo.model_validate({"name": name, "downscale": size}) for name, size in downscales.items())
    latent = LatentInfo(channels=sizes.latent_channels, axes=axes)
    return level_tables(rotary_positions(sizes.head_dim), latent, NATIVE_PATCH, device)


def encode_clips(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Clips (B, 3, 4f + 1, 8h, 8w) in [-1, 1] → latents (B, C, f + 1, h, w), not yet scaled."""
    latent: Tensor = vae.encode(pixels).latent_dist.mode()
    return latent


def decode_latents(vae: AutoencoderKLWan, latent: Tensor) -> Tensor:
    """The way back, as `AutoencoderKLWan.decode` goes it but for its limits: what lies beyond white has a gradient."""
    unpacked = vae.post_quant_conv(latent)
    caches: list[Tensor | None] = [None] * len(cache_shapes(vae.decoder))
    frames = [
        vae.decoder(frame, feat_cache=caches, feat_idx=[0], first_chunk=number == 0)
        for number, frame in enumerate(unpacked.split(1, dim=2))
    ]
    return torch.cat(frames, dim=2)


def latent_scale(vae: AutoencoderKLWan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a latent's channels, (1, C, 1, 1, 1): the transformer knows (latent − mean) / deviation."""
    values = (vae.config.latents_mean, vae.config.latents_std)
    mean, deviation = (torch.tensor(value, device=device).view(1, -1, 1, 1, 1) for value in values)
    return mean, deviation
