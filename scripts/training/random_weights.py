"""Models without their trained weights: to measure speed and memory, a configuration is enough."""

import torch
from diffusers import FluxTransformer2DModel

from ddit.exporter.components import TORCH_DTYPES
from ddit.exporter.families.flux.model import Flux
from ddit.exporter.families.flux.modules import FEED_FORWARD, FluxLevel
from ddit.exporter.levels import AdapterConfig
from training.encoding import Rows


def random_transformer(config: dict[str, object], dtype: torch.dtype, device: torch.device) -> FluxTransformer2DModel:
    """A transformer of a configuration with torch's initial weights, made in place: 12 billion in float32 are 48 GB."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return FluxTransformer2DModel.from_config(config)
    finally:
        torch.set_default_dtype(usual)


def random_level(transformer: FluxTransformer2DModel, patch: int) -> FluxLevel:
    """A coarse level whose additions are as if trained: none of them is zero."""
    level = FluxLevel(transformer, patch, AdapterConfig(targets=FEED_FORWARD))
    with torch.no_grad():
        for parameter in level.own_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return level


def random_text(flux: Flux, count: int, length: int, device: torch.device) -> Rows:
    """Embeddings of no prompt in particular."""
    config, dtype = flux.transformer_config, TORCH_DTYPES[flux.dtype]
    context = torch.randn(count, length, config["joint_attention_dim"], dtype=dtype)
    return Rows([{"context": context, "pooled": torch.randn(count, config["pooled_projection_dim"])}], device)
