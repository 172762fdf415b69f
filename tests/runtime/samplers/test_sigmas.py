"""Noise levels against diffusers' scheduler."""

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from hypothesis import given, settings
from hypothesis import strategies as st

from ddit.runtime.bundle.manifest import FlowMatchEulerInfo
from ddit.runtime.samplers.sigmas import noise, sigmas


def sampler(dynamic: bool, shift: float) -> FlowMatchEulerInfo:
    return FlowMatchEulerInfo(
        use_dynamic_shifting=dynamic,
        shift=shift,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        steps=28,
    )


@given(
    steps=st.integers(1, 100), tokens=st.integers(16, 16384), dynamic=st.booleans(), shift=st.sampled_from([1.0, 3.0])
)
@settings(deadline=None, max_examples=60)
def test_sigmas_are_those_of_diffusers(steps, tokens, dynamic, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic, shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    own = sigmas(sampler(dynamic, shift), steps, tokens)
    np.testing.assert_allclose(own, scheduler.sigmas.numpy(), atol=1e-6)
    assert own[-1] == 0.0
    assert (np.diff(own) < 0).all()


def test_noise_is_the_seed_s_own():
    assert np.array_equal(noise(3, (1, 2, 4, 4)), noise(3, (1, 2, 4, 4)))
    assert not np.array_equal(noise(3, (1, 2, 4, 4)), noise(4, (1, 2, 4, 4)))
    assert noise(0, (1, 16, 64, 64)).std() == pytest.approx(1.0, abs=0.01)
