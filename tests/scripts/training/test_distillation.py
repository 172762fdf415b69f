"""What distillation counts."""

import pytest
import torch

from training.distillation import Means


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
