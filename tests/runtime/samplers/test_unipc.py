"""UniPC beside diffusers' scheduler: noise levels, what the model is told, and every step's latent."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from ddit.runtime.bundle.manifest import FlowMatchEulerInfo, UniPCInfo
from ddit.runtime.samplers.sigmas import sigmas, timesteps
from ddit.runtime.samplers.unipc import coefficients

STEPS = (1, 2, 3, 5, 10, 30, 50)


def scheduler(steps: int, shift: float, order: int) -> UniPCMultistepScheduler:
    """As Wan 2.1's folders configure it."""
    made = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=order
    )
    made.set_timesteps(steps)
    return made


@pytest.mark.parametrize("steps", [*STEPS, 100])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 12.0])
def test_noise_levels_and_timesteps_are_the_scheduler_s(steps, shift):
    theirs, info = scheduler(steps, shift, 2), UniPCInfo(shift=shift, order=2, train_steps=1000, steps=50)
    np.testing.assert_allclose(sigmas(info, steps, 1), theirs.sigmas.numpy(), atol=1e-7)
    np.testing.assert_allclose(timesteps(info, steps, 1) * 1000, theirs.timesteps.numpy(), atol=1e-4)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_step_is_the_scheduler_s(steps, order, shift):
    """On a field that turns and bends: what it is does not matter, only that both follow the same one."""
    theirs, info = scheduler(steps, shift, order), UniPCInfo(shift=shift, order=order, train_steps=1000, steps=50)
    levels = [float(sigma) for sigma in sigmas(info, steps, 1)]
    generator = torch.Generator().manual_seed(steps)
    mixing = 0.3 * torch.randn(3, 3, generator=generator)

    def velocity(latent: torch.Tensor, sigma: float) -> torch.Tensor:
        return torch.tanh(torch.einsum("ij,bjk->bik", mixing, latent)) * (1 + sigma) + 0.3 * latent

    expected = torch.randn(2, 3, 5, generator=generator)
    latent, before = expected.double().numpy(), []
    for step, timestep in enumerate(theirs.timesteps):
        expected = theirs.step(velocity(expected, levels[step]), timestep, expected, return_dict=False)[0]
        own = velocity(torch.from_numpy(latent).float(), levels[step]).double().numpy()
        estimates = [latent - levels[step] * own, *before]
        weights = coefficients(levels, step, 0, order)
        latent = latent + sum(b * (x - latent) for b, x in zip(weights, estimates, strict=False))
        before = estimates[:order]
        np.testing.assert_allclose(latent, expected.numpy(), atol=1e-5 * np.abs(latent).max())


def test_without_memory_a_step_is_euler_s():
    levels = [1.0, 0.8, 0.5, 0.0]
    b, *others = coefficients(levels, 0, 0, 2)
    assert b == pytest.approx(1 - 0.8)
    assert not any(others)
    assert coefficients(levels, 1, 1, 2)[0] == pytest.approx(1 - 0.5 / 0.8)  # a run that goes on there


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_euler_s_grid_may_end_where_the_scheduler_s_does(steps):
    """Wan's pipeline leaves the grid to the scheduler; FLUX's asks for 1 … 1/steps."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(steps)
    info = FlowMatchEulerInfo(
        use_dynamic_shifting=False, shift=3.0, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096, smallest=theirs.sigma_min, steps=50,
    )  # fmt: skip
    np.testing.assert_allclose(sigmas(info, steps, 1), theirs.sigmas.numpy(), atol=1e-6)
