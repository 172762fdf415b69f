"""Models without their trained weights: to measure speed and memory, a configuration is enough."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ddit.exporter.components import TORCH_DTYPES, keep_float32
from ddit.exporter.families.base import Family
from ddit.exporter.levels import AdapterConfig, Level
from ddit.runtime import shapes
from ddit.runtime.bundle.names import GUIDANCE, LATENT, TABLES, TIMESTEP
from training.encoding import Rows


def random_transformer(family: Family, device: torch.device, changes: Mapping[str, Any] | None = None) -> nn.Module:
    """A family's transformer with torch's initial weights, made in place: 12 billion in float32 are 48 GB.

    ``changes``: settings of its configuration that are to be others.
    """
    dtype, usual = TORCH_DTYPES[family.dtype], torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            transformer = family.transformer_class.from_config({**family.transformer_config, **(changes or {})})
    finally:
        torch.set_default_dtype(usual)
    return keep_float32(transformer, family.transformer_class._keep_in_fp32_modules or (), dtype)


def random_level(family: Family, transformer: nn.Module, patch: int) -> Level:
    """A coarse level whose additions are as if trained: none of them is zero."""
    level = family.build_level(transformer, patch, AdapterConfig(targets=family.feed_forward))
    with torch.no_grad():
        for parameter in level.own_parameters().values():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return level


def random_text(family: Family, count: int, length: int, device: torch.device) -> Rows:
    """What a level would be told of prompts, of no prompt in particular."""
    sizes, dtype = {"B": count, "L": length}, TORCH_DTYPES[family.dtype]
    others = {LATENT, TIMESTEP, GUIDANCE, *TABLES}
    specs = [spec for spec in family.level_job(family.native).inputs if spec.name not in others]
    return Rows([{spec.name: torch.randn(shapes.resolve(spec.shape, sizes), dtype=dtype) for spec in specs}], device)
