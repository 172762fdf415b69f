"""What distillation counts."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from ddit.exporter.families.wan.model import rotary_positions as wan_positions
from ddit.exporter.families.wan.modules import WanLevel
from ddit.runtime.bundle.manifest import AxisInfo, LatentInfo
from tiny_wan import tiny_adapter_config as tiny_wan_adapter_config
from tiny_wan import tiny_transformer as tiny_wan_transformer
from training.distillation import Distillation, Means, States, level_tables
from training.loop import Training


def test_common_errors_count_more():
    means = Means(patch=3.0, picture=5.0)
    hue = torch.ones(2, 4, 8, 8) * 0.5  # the whole picture is off
    assert means.loss(hue, 4).item() == pytest.approx((3 + 5) * 0.25)
    checks = (torch.arange(2)[:, None] + torch.arange(2)) % 2 * 2.0 - 1
    mottle = checks.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(2, 4, 8, 8)  # patches are, by turns
    assert means.loss(mottle, 4).item() == pytest.approx(3)
    detail = checks.repeat(4, 4).expand(2, 4, 8, 8)  # pixels are
    assert means.loss(detail, 4).item() == pytest.approx(0)
    assert Means().loss(hue, 4).item() == 0


def test_both_passes_are_distilled_and_lead_as_the_pipeline_is_guided():
    """The teacher's velocity is `WanPipeline`'s, and the gradient that of both passes' mean squared error."""
    transformer = tiny_wan_transformer()
    level = WanLevel(transformer, 4, tiny_wan_adapter_config(rank=4, residual_width=8))
    teacher = WanLevel(transformer, 2)
    config, clip = transformer.config, (16, 2, 8, 8)
    axes = (AxisInfo(name="frames", downscale=4), *(AxisInfo(name=name, downscale=8) for name in ("height", "width")))
    tables = level_tables(
        wan_positions(config.attention_head_dim), LatentInfo(channels=16, axes=axes), 2, torch.device("cpu")
    )
    run = Training(batch=2, accelerator=Accelerator(mixed_precision="no", cpu=True))
    latent, timestep, scale = torch.randn(2, *clip), torch.tensor([0.9, 0.4]), torch.tensor([3.0, 5.0])
    context, negative = torch.randn(2, 2, 5, config.text_dim)
    states = States(latent, timestep, {"context": context}, scale, {"context": negative})

    velocities = Distillation(run, teacher, {4: level}, tables).backward(states)
    own = level.own_parameters()
    found = {name: parameter.grad.clone() for name, parameter in own.items()}

    with torch.no_grad():
        theirs = [
            transformer(latent, timestep * 1000, encoder_hidden_states=text).sample for text in (context, negative)
        ]
    guided = theirs[1] + scale.view(2, 1, 1, 1, 1) * (theirs[0] - theirs[1])  # as in the pipeline's loop
    torch.testing.assert_close(velocities[2], guided, atol=1e-4, rtol=1e-4)
    level.zero_grad()
    ours = [
        level(latent=latent, timestep=timestep, context=text, **tables(4, clip[1:])) for text in (context, negative)
    ]
    F.mse_loss(torch.stack(ours), torch.stack(theirs)).backward()
    for name, parameter in own.items():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-3)
    assert any(gradient.abs().max() > 0 for gradient in found.values())


def test_a_clip_s_frames_are_pictures():
    means, error = Means(patch=3.0, picture=5.0), torch.randn(2, 4, 3, 8, 8)
    frames = error.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(means.loss(error, 4), means.loss(frames, 4))
