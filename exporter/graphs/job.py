"""What an export needs to know of a graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddit.runtime.bundle.manifest import Dtype, TensorSpec

Original = Callable[..., Tensor | tuple[Tensor, ...]]
Tables = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class GraphJob:
    """A module to be exported and everything that the export needs to know of it."""

    name: str
    module: nn.Module  # its parameters may be on the meta device
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dtype: Dtype  # of the arithmetic inside; inputs and outputs are float32
    values: Callable[[str], Tensor]  # a parameter's or buffer's value, by its dotted name in the module
    place: Callable[[str], tuple[str, str]]  # its file in the bundle and its name there
    # loads what the graph must agree with onto a device, in float32 from weights rounded to `dtype`: a function of the
    # graph's inputs, by name, that gives its outputs, and that never goes through `module`
    original: Callable[[torch.device], Original]
    trace_sizes: Mapping[str, int]
    vocabulary: int = 0  # of token ids among the inputs
    tables: Callable[[Mapping[str, int]], Tables] = lambda sizes: {}  # inputs that follow from the sizes: positions

    @property
    def parameters(self) -> int:
        """Numbers in the module's weights."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def level_name(patch: int) -> str:
    """The name of a level's graph."""
    return f"level-{patch}"


def floats(name: str, *shape: int | str) -> TensorSpec:
    """A float32 tensor of a graph's signature."""
    return TensorSpec(name=name, dtype="float32", shape=shape)


def ids(name: str, *shape: int | str) -> TensorSpec:
    """An int64 tensor of a graph's signature."""
    return TensorSpec(name=name, dtype="int64", shape=shape)


def equation_job(name: str, module: nn.Module, equation: Callable[..., Any], **rest: Any) -> GraphJob:
    """The job of a module without weights, whose original is an equation on NumPy arrays in float64.

    The equation takes the graph's inputs by name and gives its outputs: an array, or a tuple of them.
    """

    def original(device: torch.device) -> Original:
        def compute(**inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
            found = equation(**{name: value.double().cpu().numpy() for name, value in inputs.items()})
            return tuple(map(torch.from_numpy, found)) if isinstance(found, tuple) else torch.from_numpy(found)

        return compute

    return GraphJob(
        name=name,
        module=module,
        dtype="fp32",
        values=lambda key: torch.empty(0),
        place=lambda key: ("", key),
        original=original,
        **rest,
    )


def loaded_job(name: str, module: nn.Module, **rest: Any) -> GraphJob:
    """The job of a module that is small enough to be traced with its weights, which become ``<name>.safetensors``."""
    state = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    return GraphJob(
        name=name,
        module=module,
        values=lambda key: state[key],
        place=lambda key: (f"{name}.safetensors", key),
        **rest,
    )
