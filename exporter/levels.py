"""The parts that every family's coarse level is built of: embed ∘ trunk ∘ head, with the trunk's weights shared.

A level is the base model at another patch size. Coarse patch embeddings start from the native ones by PI-resize
(FlexiViT, arXiv 2212.08013, equation 4), heads as "native head, then bilinear upsampling", and everything that DDiT
(arXiv 2602.16968) adds (identity vector, residual path, LoRA) starts at zero, so that training begins at the resized
base model. The trunk is frozen and shared; at the native level nothing is added at all.
"""

import copy
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddit.runtime.errors import AdapterError

WIDEST = 65_536  # rank of LoRA and channels of the residual path


@dataclass(frozen=True)
class AdapterConfig:
    """What a coarse level adds beside its embedding and head, which it always has."""

    rank: int = 32  # of LoRA; 0 leaves it out
    alpha: float = 32.0
    targets: tuple[str, ...] = field(kw_only=True)  # ends of the dotted names of the layers that get LoRA
    residual_width: int = 64  # channels inside the residual path; 0 leaves it out
    identity: bool = True  # one learned vector, added to every token

    def __post_init__(self) -> None:
        """Raise `ValueError` for settings that no adapter has: they may come from a file."""
        for name, value in (("rank", self.rank), ("residual_width", self.residual_width)):
            if type(value) is not int or not 0 <= value <= WIDEST:
                raise ValueError(f"{name} must lie between 0 and {WIDEST}, not {value!r}")
        if not isinstance(self.alpha, int | float) or not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be a number, not {self.alpha!r}")
        if not all(isinstance(target, str) and target for target in self.targets):
            raise ValueError(f"targets must be names, not {self.targets!r}")


def bilinear_matrix(native: int, patch: int) -> Tensor:
    """The matrix that upsamples a flattened native patch to a coarse one: ``(patch², native²)`` float64.

    Half-pixel centres, clamped edges (``align_corners=False``): the Kronecker square of the 1-D matrix.
    """
    line = F.interpolate(torch.eye(native, dtype=torch.float64)[None], size=patch, mode="linear", align_corners=False)
    return torch.kron(line[0].T.contiguous(), line[0].T.contiguous())


def resize_embedding(weight: Tensor, native: int, patch: int) -> Tensor:
    """PI-resize of a patch embedding ``(D, C·native²)`` to ``(D, C·patch²)``: ``pinv(Bᵀ) w`` for every channel.

    Embedding an upsampled patch then gives exactly what the native embedding gives for the patch itself.
    """
    inverse = torch.linalg.pinv(bilinear_matrix(native, patch)).to(weight.device)  # (native², patch²)
    blocks = weight.double().reshape(weight.shape[0], -1, native * native)
    resized: Tensor = (blocks @ inverse).flatten(1)
    return resized.to(weight.dtype)


def resize_head(weight: Tensor, bias: Tensor, native: int, patch: int) -> tuple[Tensor, Tensor]:
    """Native head ``(C·native², D)``, then bilinear upsampling of every patch, as one head ``(C·patch², D)``."""
    up = bilinear_matrix(native, patch).to(weight.device)
    new_weight = torch.einsum("pq,cqd->cpd", up, weight.double().reshape(-1, native * native, weight.shape[1]))
    new_bias = bias.double().reshape(-1, native * native) @ up.T
    return new_weight.flatten(0, 1).to(weight.dtype), new_bias.flatten().to(bias.dtype)


def patchify(latent: Tensor, patch: int) -> Tensor:
    """Cut ``(B, C, H, W)`` into tokens ``(B, H/p · W/p, C·p·p)``, row by row, channels outermost in a token."""
    batch, channels, height, width = latent.shape
    grid = latent.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // patch) * (width // patch), channels * patch * patch)


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Put tokens ``(B, h·w, C·p·p)`` of an ``(h, w)`` grid back together: ``(B, C, h·p, w·p)``."""
    batch, _, size = tokens.shape
    channels = size // (patch * patch)
    grid = tokens.reshape(batch, height, width, channels, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height * patch, width * patch)


class LoRALinear(nn.Linear):
    """A shared linear layer with a low-rank side branch (LoRA, arXiv 2106.09685): ``x Wᵀ + b + α/r · (x Aᵀ) Bᵀ``.

    ``weight`` and ``bias`` are the base layer's own tensors; ``lora_A`` and ``lora_B`` are named as peft names them.
    The branch is not merged, so that levels go on sharing one copy of the base weights.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate a weight of its own
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale = alpha / rank
        like: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **like)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **like)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.lora_B(self.lora_A(x))
        return F.linear(x, self.weight, self.bias) + branch * self.scale


class ResidualPath(nn.Module):
    """What the coarse head cannot write: a correction at full resolution, from before the embedding to after the head.

    Two 3×3 convolutions over the latent and the coarse velocity side by side, modulated by the timestep's embedding
    (FiLM, arXiv 1709.07871), because how much of the noisy latent is noise depends on the timestep. The last layer
    starts at zero, and only that one: with two zero layers in a row no gradient would reach either.
    """

    def __init__(self, channels: int, width: int, embedding: int, **like: Any):
        super().__init__()
        self.conv_in = nn.Conv2d(2 * channels, width, 3, padding=1, **like)
        self.film = nn.Linear(embedding, 2 * width, **like)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1, **like)
        nn.init.zeros_(self.conv_out.weight)
        assert self.conv_out.bias is not None
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, latent: Tensor, velocity: Tensor, embedding: Tensor) -> Tensor:
        """``latent`` and ``velocity`` (B, C, H, W), ``embedding`` (B, D) → correction (B, C, H, W)."""
        scale, shift = self.film(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
        hidden = self.conv_in(torch.cat([latent, velocity], dim=1))
        correction: Tensor = self.conv_out(F.silu(hidden * (1 + scale) + shift))
        return correction


def share_parameters(module: nn.Module) -> nn.Module:
    """A copy of the module tree with the very same tensors in it, so that layers can be replaced in the copy."""
    tensors = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    return copy.deepcopy(module, memo=tensors)


def add_lora(trunk: nn.Module, targets: Iterable[str], rank: int, alpha: float) -> list[str]:
    """Replace every linear layer whose dotted name ends with a target by a `LoRALinear`; returns the names replaced.

    Raises `AdapterError` where there is none.
    """
    targets = tuple(targets)
    pattern = re.compile(rf"(^|\.)({'|'.join(re.escape(target) for target in targets)})$")
    layers = {n: layer for n, layer in trunk.named_modules() if isinstance(layer, nn.Linear) and pattern.search(n)}
    if not layers:
        raise AdapterError(f"the adapter's targets {', '.join(targets)} are no linear layers of the model")
    for name, layer in layers.items():
        trunk.set_submodule(name, LoRALinear(layer, rank, alpha))
    return list(layers)


class Level(nn.Module):
    """Base of every family's level: a trunk shared with the other levels and what this level adds to it.

    Called with the inputs of its graph by their names, it gives the velocity.
    """

    patch: int  # side of a patch in latent pixels
    embed: nn.Linear  # what reads patches, and what writes them
    head: nn.Linear
    dtype: torch.dtype  # of the arithmetic in the trunk
    trunk: Any  # torch types the attributes of a module as Tensor | Module, which fits no call
    config: AdapterConfig | None = None
    checkpointing: bool = False  # training computes a block's activations again instead of keeping them

    def run_block(self, block: nn.Module, *inputs: Any) -> Any:
        """One of the trunk's blocks."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """What only this level has, by name; empty at the native level. These are what an adapter trains and stores."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if not name.startswith("trunk.") or ".lora_" in name
        }
