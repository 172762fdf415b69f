"""What an export needs to know of a graph."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ddit.runtime.bundle.manifest import Dtype, TensorSpec


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
    reference: Callable[[], nn.Module]  # the same module with its weights, for the parity check
    trace_sizes: Mapping[str, int]
    vocabulary: int = 0  # of token ids among the inputs
