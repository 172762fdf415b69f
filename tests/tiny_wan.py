"""A random Wan 2.1 pipeline of a few hundred kilobytes with the real architecture, for tests."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from ddit.exporter.adapter import save_adapter
from ddit.exporter.families.wan.modules import FEED_FORWARD, WanLevel
from ddit.exporter.levels import AdapterConfig
from tiny import t5_tokenizer

CHANNELS, TEXT_WIDTH = 16, 24
SHIFT = 3.0


def unipc() -> UniPCMultistepScheduler:
    """The scheduler of Wan 2.1's folders."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, solver_order=2
    )


def euler() -> FlowMatchEulerDiscreteScheduler:
    """The other scheduler that Wan is sampled with."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def perturbed(module: nn.Module) -> nn.Module:
    """The module in evaluation mode, with random biases and scales too: zeros and ones would hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module.eval()


def tiny_transformer(**settings: Any) -> WanTransformer3DModel:
    """Wan's transformer, two heads wide; rows and columns rotate four numbers of a head each, frames eight."""
    usual = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_WIDTH,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
        "rope_max_seq_len": 64,
    }
    return perturbed(WanTransformer3DModel(**{**usual, **settings}))


def tiny_vae(**settings: Any) -> AutoencoderKLWan:
    """Wan's VAE with 8 to 32 channels; its latents' mean and deviation are Wan 2.1's, diffusers' defaults."""
    usual = {"base_dim": 8, "z_dim": CHANNELS, "num_res_blocks": 1}
    return perturbed(AutoencoderKLWan(**{**usual, **settings}))


def tiny_encoder(vocabulary: int) -> UMT5EncoderModel:
    """UMT5's encoder: other than T5, every layer has position biases of its own."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
    )
    return perturbed(UMT5EncoderModel(config))


def tiny_pipeline(*, scheduler: Any = None) -> WanPipeline:
    """The pipeline in memory, the same at every call; sampled with UniPC unless another scheduler is given."""
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=tiny_encoder(len(tokenizer)),
        vae=tiny_vae(),
        scheduler=scheduler or unipc(),
        transformer=tiny_transformer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny_pipeline(folder: Path, *, scheduler: Any = None) -> Path:
    """Write the pipeline as a diffusers folder."""
    tiny_pipeline(scheduler=scheduler).save_pretrained(folder)
    return folder


def tiny_adapter_config(**settings: Any) -> AdapterConfig:
    """An adapter's settings with LoRA in the feed-forward layers."""
    return AdapterConfig(**{"targets": FEED_FORWARD, **settings})


def save_tiny_adapter(path: Path, pipeline: Path, patches: tuple[int, ...] = (4, 8)) -> Path:
    """Write an adapter of random tensors, as if trained: nothing in it is zero."""
    transformer = WanTransformer3DModel.from_pretrained(pipeline / "transformer")
    levels = {
        patch: WanLevel(transformer, patch, tiny_adapter_config(rank=4, alpha=8.0, residual_width=8))
        for patch in patches
    }
    for level in levels.values():
        for parameter in level.own_parameters().values():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    save_adapter(path, levels, base_model="tiny", family="wan")
    return path
