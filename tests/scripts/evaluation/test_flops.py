"""Operations counted in a bundle's graphs are those that torch counts in the original model."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddit.runtime import Bundle
from ddit.runtime.errors import UsageError
from ddit.runtime.shapes import Size
from evaluation import flops

TEXT = 16  # tokens of the tiny pipeline's prompts


@pytest.mark.parametrize("text", [None, 40])
def test_the_native_level_counts_as_torch_does(tiny_bundle, tiny_pipeline, text):
    transformer = FluxTransformer2DModel.from_pretrained(tiny_pipeline / "transformer")
    # torch's counter does not know the fused attention of CPUs
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        transformer(
            torch.randn(1, 32, 16),  # 64×128 pixels: 4×8 patches
            torch.randn(1, text or TEXT, 24),
            torch.randn(1, 20),
            torch.ones(1),
            torch.zeros(32, 3),
            torch.zeros(text or TEXT, 3),
            torch.ones(1),
        )
    counted = flops.level_flops(Bundle.open(tiny_bundle), size=Size(64, 128), text=text)
    assert counted[2] == counter.get_total_flops()


def test_a_clip_s_native_level_counts_as_torch_does_for_every_pass(wan_bundle):
    transformer = WanTransformer3DModel.from_pretrained(wan_bundle.with_suffix(".model") / "transformer")
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        transformer(torch.randn(1, 16, 3, 8, 16), torch.ones(1), torch.randn(1, TEXT, 24))  # 9 frames of 64×128 pixels
    bundle, size, once = Bundle.open(wan_bundle), Size(64, 128, 9), counter.get_total_flops()
    assert flops.level_flops(bundle, size=size, guidance=1.0)[2] == once
    assert flops.level_flops(bundle, size=size)[2] == 2 * once  # the bundle's guidance is 5


def test_coarser_levels_cost_less_and_larger_pictures_more(tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    small, large = (flops.level_flops(bundle, size=Size(side, side)) for side in (128, 256))
    assert small[2] > small[4] > small[8]
    assert all(large[patch] > small[patch] for patch in (2, 4, 8))


def test_a_size_that_the_bundle_cannot_make_is_refused(tiny_bundle):
    with pytest.raises(UsageError, match="not a multiple of 64"):
        flops.level_flops(Bundle.open(tiny_bundle), size=Size(100, 64))
