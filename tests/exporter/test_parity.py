"""The parity gate's reference values."""

import torch
from torch import nn

from ddit.exporter.graphs.job import GraphJob
from ddit.exporter.parity import reference_arrays
from ddit.runtime.bundle.manifest import TensorSpec


class Watched(nn.Module):
    """Tells what torch may do to its convolutions."""

    def forward(self, x):
        return x * torch.backends.cudnn.allow_tf32


def test_references_are_computed_in_float32_where_a_gpu_would_take_tf32():
    spec = TensorSpec(name="x", dtype="float32", shape=("B", 2))
    job = GraphJob("watched", Watched(), (spec,), (spec,), "fp32", {}.get, {}.get, Watched, {"B": 1})
    allowed = torch.backends.cudnn.allow_tf32
    arrays = reference_arrays(job, [{"B": 3}])
    assert arrays["watched/0/input/x"].any()
    assert not arrays["watched/0/output/x"].any()
    assert torch.backends.cudnn.allow_tf32 == allowed
