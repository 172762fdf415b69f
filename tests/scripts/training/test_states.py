"""Where training states come from: the sampler's own trajectories, and pictures with noise."""

import numpy as np
import pytest
import torch

from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.manifest import UniPCInfo
from ddit.runtime.samplers.sigmas import sigmas
from tiny_wan import SHIFT, unipc
from training.encoding import Rows
from training.states import POOL_LEAST, Draws, Noised, Sampling, Text, Trajectories

UNIPC = UniPCInfo(shift=SHIFT, order=2, train_steps=1000, steps=50)
LATENT = (4, 8, 8)
TOKENS = 16  # of such a latent at patch 2
CPU = torch.device("cpu")


@pytest.fixture
def sampler(tiny_bundle):
    return Bundle.open(tiny_bundle).manifest.sampler


def text(count: int) -> Text:
    return Text(Rows([{"context": torch.arange(count)[:, None, None].float(), "pooled": torch.zeros(count, 2)}], CPU))


def sampling(sampler, *, steps=(3, 3), guidance=(2.0, 2.0), latent=LATENT) -> Sampling:
    return Sampling(sampler=sampler, tokens=TOKENS, latent=latent, steps=steps, guidance=guidance)


def trajectories(sampler, *, batch: int = POOL_LEAST, steps=(3, 3), guidance=(2.0, 2.0), **options) -> Trajectories:
    what = sampling(sampler, steps=steps, guidance=guidance)
    return Trajectories(text(5), what, batch=batch, draws=Draws(0, CPU), **options)


def test_noise_levels_are_the_sampler_s(sampler):
    table, told = sampling(sampler, steps=(1, 6)).tables(CPU)
    for steps in range(1, 7):
        np.testing.assert_array_equal(table[steps, : steps + 1], sigmas(sampler, steps, TOKENS))
        assert not table[steps, steps + 1 :].any()
        assert torch.equal(told[steps, :steps], table[steps, :steps])


def test_unipc_s_levels_are_diffusers_and_the_model_is_told_whole_steps():
    scheduler = unipc()
    table, told = sampling(UNIPC, steps=(1, 7)).tables(CPU)
    for steps in range(1, 8):
        scheduler.set_timesteps(steps)
        torch.testing.assert_close(table[steps, : steps + 1], scheduler.sigmas.float(), atol=1e-6, rtol=0)
        assert torch.equal(told[steps, :steps], scheduler.timesteps / 1000)
        assert not told[steps, steps:].any()


def test_a_clip_s_trajectory_moves_by_the_guided_velocity():
    """As `WanPipeline` has it: the noise's prediction with the negative prompt, then on towards the other one."""
    clip = (4, 3, 8, 8)
    negative = Rows([{"context": torch.full((1, 1, 1), -1.0)}], CPU)
    words = Text(Rows([{"context": torch.arange(5.0)[:, None, None]}], CPU), negative)
    what = sampling(UNIPC, steps=(3, 3), guidance=(2.0, 6.0), latent=clip)
    pool = Trajectories(words, what, batch=4, draws=Draws(0, CPU))
    states = pool.draw()
    one, other = states.passes()
    assert "guidance" not in one
    assert torch.equal(one["context"][:, 0, 0], pool.prompt[pool.drawn].float())
    assert (other["context"] == -1).all()
    assert torch.equal(one["latent"], other["latent"])
    scale = states.guidance
    assert len(set(scale.tolist())) == 4
    assert ((scale >= 2) & (scale <= 6)).all()
    positive, away = torch.randn(2, 4, *clip)
    guided = states.velocity([positive, away])
    torch.testing.assert_close(guided, away + scale[:, None, None, None, None] * (positive - away))

    before, length = states.latent.clone(), pool.length[pool.drawn].clone()
    pool.advance({2: guided, 4: guided + 100})
    change = (pool.sigmas[length, 1] - pool.sigmas[length, 0])[:, None, None, None, None]
    going_on = length > 1
    torch.testing.assert_close(pool.latent[pool.drawn][going_on], (before + change * guided)[going_on])


def test_the_teacher_leads_an_euler_step(sampler):
    pool = trajectories(sampler, batch=8)
    states = pool.draw()
    rows = pool.drawn
    before, length = pool.latent[rows].clone(), pool.length[rows].clone()
    velocity = torch.randn(8, *LATENT)
    pool.advance({2: velocity, 4: velocity + 100})
    assert torch.equal(states.timestep, pool.sigmas[length, 0])
    change = pool.sigmas[length, 1] - pool.sigmas[length, 0]
    going_on = length > 1
    expected = before + change[:, None, None, None] * velocity
    torch.testing.assert_close(pool.latent[rows][going_on], expected[going_on])
    assert (pool.step[rows] == going_on.long()).all()


def test_a_finished_trajectory_makes_place_for_a_new_one(sampler):
    pool = trajectories(sampler, batch=8)
    for _ in range(200):
        pool.advance({2: torch.zeros_like(pool.draw().latent)})
        assert (pool.step < pool.length).all()
    assert (pool.length == 3).all()  # those of random length at the start are gone
    assert set(pool.step.tolist()) == {0, 1, 2}  # all noise levels at once
    assert pool.latent.std().item() == pytest.approx(1, abs=0.1)


def test_trajectories_may_start_from_pictures_with_noise_on(sampler):
    pictures = torch.arange(5.0)[:, None, None, None].expand(5, *LATENT) * 10
    pool = trajectories(sampler, batch=400, steps=(4, 4), pictures=pictures)
    passed = torch.zeros(4)
    for _ in range(40):
        states = pool.draw()
        step = pool.step[pool.drawn]
        passed += step.bincount(minlength=4)
        sigma = states.timestep
        shown = (1 - sigma[:, None, None, None]) * states.text["context"][:, :, :, None] * 10
        noise = (states.latent - shown).flatten(1)
        new = noise.std(1) > 0  # the others were moved on by the velocity below
        torch.testing.assert_close(noise[new].std(1), sigma[new], atol=0.3, rtol=0.2)
        # the velocity that leads from noise to the picture
        clean = pictures[pool.prompt[pool.drawn]]
        pool.advance({2: (states.latent - clean) / sigma[:, None, None, None]})
    assert (passed.diff() > 0).all()  # the later, the more


def test_any_level_leads_on_policy(sampler):
    pool = trajectories(sampler, on_policy=True)
    pool.length.fill_(3)
    states = pool.draw()
    before, sigma = states.latent.clone(), pool.sigmas[3]
    pool.advance({2: torch.full_like(before, 0.0), 4: torch.full_like(before, 1.0), 8: torch.full_like(before, 2.0)})
    moved = (pool.latent[pool.drawn] - before).mean((1, 2, 3)) / (sigma[1] - sigma[0])
    assert set(moved.round().int().tolist()) == {0, 1, 2}


def test_a_pool_can_be_kept(sampler):
    first, again = trajectories(sampler, batch=8, steps=(2, 9)), trajectories(sampler, batch=8, steps=(2, 9))
    for _ in range(5):
        first.advance({2: torch.ones_like(first.draw().latent)})
    again.load_state_dict(first.state_dict())
    for _ in range(3):
        one, other = first.draw(), again.draw()
        assert torch.equal(one.latent, other.latent)
        assert torch.equal(one.text["context"], other.text["context"])
        for pool in (first, again):
            pool.advance({2: torch.ones_like(one.latent)})


def test_pictures_get_the_noise_of_their_noise_level(sampler):
    latents = Rows([{"latent": torch.full((5, *LATENT), 3.0)}], CPU)
    what = sampling(sampler, steps=(4, 4), guidance=None)
    states = Noised(text(5), latents, what, batch=4000, draws=Draws(0, CPU)).draw()
    assert states.guidance is None
    assert set(states.timestep.tolist()) == set(sigmas(sampler, 4, 16)[:-1].tolist())
    for sigma in states.timestep.unique().tolist():
        chosen = states.latent[states.timestep == sigma]
        assert chosen.mean().item() == pytest.approx(3 * (1 - sigma), abs=0.03)
        assert chosen.std().item() == pytest.approx(sigma, abs=0.03)
