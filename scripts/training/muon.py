"""Muon (Jordan et al. 2024): momentum, made orthogonal, for the matrices of hidden layers; Adam for everything else.

A convolution's kernel is a matrix (outputs, inputs · kernel's size). Updates are scaled to the root mean square of
Adam's, so that both take the same learning rate (arXiv 2502.16982). Matrices of one shape are updated together.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

NARROWEST = 16  # rows and columns of a matrix that is worth it
MOMENTUM = 0.95
BETAS, EPSILON = (0.9, 0.99), 1e-8
SCALE = 0.2  # root mean square of Adam's updates, in learning rates
POLYNOMIAL = (3.4445, -4.7750, 2.0315)  # takes singular values between 0 and 1 to about 1 in five rounds
ROUNDS = 5


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices (N, rows, columns), about: all singular values become 0.7 to 1.2."""
    first, second, third = POLYNOMIAL
    found: Tensor = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if tall := found.shape[1] > found.shape[2]:
        found = found.mT
    for _ in range(ROUNDS):
        square = found @ found.mT
        found = first * found + (second * square + third * square @ square) @ found
    return found.mT if tall else found


class Muon(torch.optim.Optimizer):
    """Muon for a module's wide weights, but for its ends; Adam for the rest."""

    def __init__(self, module: nn.Module, lr: float, *, ends: Iterable[nn.Module] = (), weight_decay: float = 0.0):
        """``ends``: layers that read the module's inputs and make its outputs, and embeddings; Adam suits them."""
        inside = {id(parameter) for end in ends for parameter in end.parameters()}
        wide: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for parameter in module.parameters():
            matrix = parameter.dim() > 1 and min(parameter.flatten(1).shape) >= NARROWEST
            (wide if matrix and id(parameter) not in inside else rest).append(parameter)
        groups = [{"params": wide, "matrices": True}, {"params": rest, "matrices": False}]
        super().__init__(
            [group for group in groups if group["params"]], {"lr": lr, "weight_decay": weight_decay, "steps": 0}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Change the parameters that have gradients."""
        assert closure is None
        for group in self.param_groups:
            group["steps"] += 1
            parameters: list[Tensor] = [one for one in group["params"] if one.grad is not None]
            gradients: list[Tensor] = [one.grad for one in parameters if one.grad is not None]
            if parameters:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                (self._muon if group["matrices"] else self._adam)(parameters, gradients, group)

    def _states(self, name: str, parameters: list[Tensor]) -> list[Tensor]:
        for one in parameters:
            if name not in self.state[one]:
                self.state[one][name] = torch.zeros_like(one)
        return [self.state[one][name] for one in parameters]

    def _muon(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        moments = self._states("moment", parameters)
        torch._foreach_lerp_(moments, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, moments, MOMENTUM)  # Nesterov's
        shapes: dict[torch.Size, list[int]] = {}
        for number, parameter in enumerate(parameters):
            shapes.setdefault(parameter.shape, []).append(number)
        for shape, numbers in shapes.items():
            matrices = torch.stack([ahead[number].flatten(1) for number in numbers])
            updates = orthogonal(matrices) * (SCALE * max(matrices.shape[1:]) ** 0.5)
            for number, update in zip(numbers, updates, strict=True):
                parameters[number].sub_(update.view(shape), alpha=group["lr"])

    def _adam(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        moments, squares = self._states("moment", parameters), self._states("square", parameters)
        torch._foreach_lerp_(moments, gradients, 1 - BETAS[0])
        torch._foreach_mul_(squares, BETAS[1])
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - BETAS[1])
        sizes = torch._foreach_div(squares, 1 - BETAS[1] ** group["steps"])
        torch._foreach_sqrt_(sizes)
        torch._foreach_add_(sizes, EPSILON)
        torch._foreach_addcdiv_(parameters, moments, sizes, -group["lr"] / (1 - BETAS[0] ** group["steps"]))
