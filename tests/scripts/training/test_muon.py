"""Muon against its definition in NumPy, and against Adam where it is Adam."""

import copy

import numpy as np
import torch
from torch import nn

from training.muon import MOMENTUM, NARROWEST, SCALE, Muon, orthogonal


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, NARROWEST, 3), nn.Conv2d(NARROWEST, 20, 3), nn.GELU(), nn.Flatten(), nn.Linear(20 * 16, 5)
    )


def loss_of(network: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return network(torch.randn(6, 3, 8, 8, generator=generator)).square().mean()


def test_singular_values_become_about_one():
    for shape in ((4, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert 0.5 < values.min() <= values.max() < 1.3


def test_a_hidden_kernel_moves_along_the_orthogonal_part_of_its_momentum():
    network = model()
    optimizer = Muon(network, lr=0.1, ends=(network[0], network[4]))
    before, momentum = network[1].weight.detach().clone(), 0.0
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(network).backward()
        gradient = network[1].weight.grad.numpy().reshape(20, -1).astype(np.float64)
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        left, _, right = np.linalg.svd((1 - MOMENTUM) * gradient + MOMENTUM * momentum, full_matrices=False)
        step = left @ right * SCALE * np.sqrt(16 * 9) * 0.1
        optimizer.step()
        found = (before - network[1].weight.detach()).numpy().reshape(20, -1)
        cosine = (found * step).sum() / np.linalg.norm(found) / np.linalg.norm(step)
        assert cosine > 0.97
        assert 0.8 < np.linalg.norm(found) / np.linalg.norm(step) < 1.2
        before = network[1].weight.detach().clone()


def test_everything_else_is_adam_s():
    network = model()
    other = copy.deepcopy(network)
    ours = Muon(network, lr=0.01, ends=tuple(network), weight_decay=0.1)
    theirs = torch.optim.AdamW(other.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(5):
        for optimizer, trained in ((ours, network), (theirs, other)):
            optimizer.zero_grad()
            loss_of(trained).backward()
            optimizer.step()
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_interrupted_training_goes_on():
    network = model()
    optimizer = Muon(network, lr=0.01)
    loss_of(network).backward()
    optimizer.step()
    again = copy.deepcopy(network)
    restored = Muon(again, lr=0.5)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, trained in ((optimizer, network), (restored, again)):
        one.zero_grad()
        loss_of(trained).backward()
        one.step()
    for a, b in zip(network.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b)
