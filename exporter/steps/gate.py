"""The gate: how much the model's input has changed since the step before, which tells how much its output will.

TeaCache (arXiv 2411.19108) looks at the first block's input after its normalisation was modulated with the timestep,
or, where that tells more, at what it is modulated with. A family's module makes that input, from weights that the
levels have anyway; what follows here is the same for all.
"""

from torch import Tensor

from ddit.exporter.graphs.job import floats
from ddit.runtime.bundle.manifest import TensorSpec

GATE = "gate"  # the graph
LEAST = 1e-6  # there is nothing before a run's first step, and its change is not looked at


def relative_changes(modulated: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The outputs of a gate graph.

    Args:
        modulated: (B, …, width) float32, the modulated input.
        before: that of the step before.

    Returns:
        the modulated input; and its relative L1 change, mean|x − x'| / mean|x'| (B,) of all channels, of the first half
        of them and of the second half.
    """
    half = modulated.shape[-1] // 2
    differences, sizes = (modulated - before).abs(), before.abs()
    bands = [
        (differences, sizes),
        (differences[..., :half], sizes[..., :half]),
        (differences[..., half:], sizes[..., half:]),
    ]
    whole, low, high = (_mean(one) / _mean(other).clamp(min=LEAST) for one, other in bands)
    return modulated, whole, low, high


def _mean(values: Tensor) -> Tensor:
    """(B, …) → (B,)."""
    return values.flatten(1).mean(dim=1)


def gate_state(name: str, *shape: int | str) -> TensorSpec:
    """The modulated input of a sample, as a tensor of a gate graph."""
    return floats(name, "B", *shape)


def gate_outputs(*shape: int | str) -> tuple[TensorSpec, ...]:
    """The outputs of a gate graph, for a modulated input of this shape."""
    changes = (floats(name, "B") for name in ("gate_change", "gate_change_low", "gate_change_high"))
    return (gate_state("next_gate_input", *shape), *changes)
