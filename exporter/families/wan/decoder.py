"""Wan's causal decoder, one latent frame a call, with everything that it remembers as inputs and outputs.

`AutoencoderKLWan` keeps the last two frames before every causal convolution in a list of its own; here the list goes
in and comes out. Memory then does not grow with the clip, and a host needs no state but these tensors.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ddit.exporter.levels import share_parameters

CACHED_FRAMES = 2  # a causal convolution sees three frames: the two before and its own


def cache_shapes(decoder: Any) -> list[tuple[int, int]]:
    """Channels and scale (pixels along a latent pixel) of every cache of a `WanDecoder3d`, in its order of use."""
    found = [(decoder.conv_in.in_channels, 1)]

    def add(resnets: Any, scale: int) -> None:
        for resnet in resnets:
            found.extend((convolution.in_channels, scale) for convolution in (resnet.conv1, resnet.conv2))

    add(decoder.mid_block.resnets, 1)
    scale = 1
    for block in decoder.up_blocks:
        add(block.resnets, scale)
        for upsampler in block.upsamplers or ():
            if upsampler.mode == "upsample3d":
                found.append((upsampler.time_conv.in_channels, scale))
            scale *= 2
    found.append((decoder.conv_out.in_channels, scale))
    return found


class _FrameDecoder(nn.Module):
    """A VAE's way from a latent frame to frames of a clip. The parameters of ``vae`` are shared, not copied."""

    mean: Tensor
    inverse_deviation: Tensor

    def __init__(self, vae: Any):
        super().__init__()
        self.dtype: torch.dtype = vae.dtype
        self.post_quant_conv: Any = vae.post_quant_conv
        self.decoder: Any = share_parameters(vae.decoder)
        self.caches = cache_shapes(self.decoder)
        for layer in self.decoder.modules():
            if isinstance(layer, nn.Upsample):
                layer.mode = "nearest"  # the same when a side doubles, and torch.onnx knows no "nearest-exact"
        shape = (1, vae.config.z_dim, 1, 1, 1)
        self.register_buffer("mean", torch.tensor(vae.config.latents_mean).view(shape))
        self.register_buffer("inverse_deviation", (1.0 / torch.tensor(vae.config.latents_std)).view(shape))

    def _run(self, latent_frame: Tensor, caches: list[Any]) -> Tensor:
        """Frames (B, 3, frames, height, width), which hosts cut to [-1, 1]; the list is brought up to date."""
        unscaled = (latent_frame / self.inverse_deviation + self.mean).to(self.dtype)
        frames: Tensor = self.decoder(self.post_quant_conv(unscaled), feat_cache=caches, feat_idx=[0])
        return frames.float()


class FirstFrame(_FrameDecoder):
    """A clip's first latent frame, which becomes one frame."""

    def forward(self, latent_frame: Tensor) -> tuple[Tensor, ...]:
        """(B, C, 1, H, W) → frames (B, 3, 1, 8H, 8W), then the caches for `NextFrames`, all float32.

        Where the VAE has nothing yet, or one frame only, a cache has zeros: a causal convolution fills up with them.
        """
        caches: list[Any] = [None] * len(self.caches)
        frames = self._run(latent_frame, caches)
        filled: list[Tensor] = []
        for cache in caches:
            if isinstance(cache, str):  # "Rep": the VAE's mark that this doubling of frames begins with the next call
                # the convolution before it reads a tensor of the same shape
                filled.append(torch.zeros_like(filled[-1]))
            else:
                filled.append(torch.cat([torch.zeros_like(cache), cache.float()], dim=2))
        return frames, *filled


class NextFrames(_FrameDecoder):
    """Every further latent frame, which becomes four frames."""

    def forward(self, latent_frame: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """(B, C, 1, H, W) and the caches (B, channels, 2, H·k, W·k) → frames (B, 3, 4, 8H, 8W), then the caches."""
        updated: list[Any] = [cache.to(self.dtype) for cache in caches]
        frames = self._run(latent_frame, updated)
        return frames, *(cache.float() for cache in updated)
