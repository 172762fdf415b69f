"""A diffusers pipeline's components, read from their folders."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ddit.runtime.bundle.manifest import Dtype
from ddit.runtime.errors import ModelError

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_component(cls: Any, folder: Path, dtype: Dtype) -> Any:
    """A component with its weights, in evaluation mode. Raises `ModelError`."""
    keyword = "torch_dtype" if issubclass(cls, ModelMixin) else "dtype"
    try:
        return cls.from_pretrained(folder, **{keyword: TORCH_DTYPES[dtype]}).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder} cannot be read: {str(error).strip().splitlines()[0]}") from None


def load_text_pipeline(cls: Any, folder: Path, dtype: Dtype, device: torch.device) -> Any:
    """A pipeline of which only the tokenizers and text encoders are loaded. Raises `ModelError`."""
    try:
        pipeline = cls.from_pretrained(folder, transformer=None, vae=None, torch_dtype=TORCH_DTYPES[dtype])
        return pipeline.to(device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder} cannot be read: {str(error).strip().splitlines()[0]}") from None


def load_rounded(cls: Any, folder: Path, dtype: Dtype, device: torch.device) -> Any:
    """A component in float32, from weights rounded to a graph's type. Takes four bytes a weight."""
    module: nn.Module = load_component(cls, folder, dtype).float()
    return module.to(device)


def keep_float32(module: nn.Module, names: Collection[str], dtype: torch.dtype) -> nn.Module:
    """The module in a type, but for parameters below layers of these names: what ``from_pretrained`` makes of it."""
    for name, parameter in module.named_parameters():
        kept = any(part in names for part in name.split("."))
        parameter.data = parameter.data.to(torch.float32 if kept else dtype)
    return module


def shortened(make: Callable[[], nn.Module], stored: Mapping[str, Tensor]) -> nn.Module:
    """A module of fewer blocks than its folder holds, with the weights of those that it has, in float32."""
    module = make().eval()
    names = dict.fromkeys(name for name, _ in module.named_parameters())
    module.load_state_dict({name: stored[name] for name in names}, strict=False)
    return module.float()
