"""The parity gate: what it compares with, and that it refuses a graph that computes something else."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from conftest import run
from ddit.exporter.cli import main
from ddit.exporter.families.flux.model import Flux
from ddit.exporter.families.flux.modules import ClipEncoder, FluxGate, FluxLevel, T5Encoder, VaeDecoder
from ddit.exporter.graphs.job import GraphJob
from ddit.exporter.graphs.trace import export_graph
from ddit.exporter.graphs.weights import WeightFiles
from ddit.exporter.models import find_model
from ddit.exporter.parity import check_bundle, reference_arrays
from ddit.profiles import load_profile
from ddit.runtime import Bundle
from ddit.runtime.backends.onnxruntime.host import OnnxRuntimeEngine, open_session
from ddit.runtime.bundle.manifest import TensorSpec
from ddit.runtime.errors import ParityError
from tiny import CHANNELS, save_tiny_pipeline


class Watched(nn.Module):
    """Tells what torch may do to its convolutions."""

    def forward(self, x):
        return x * torch.backends.cudnn.allow_tf32


def test_references_are_computed_in_float32_where_a_gpu_would_take_tf32():
    spec = TensorSpec(name="x", dtype="float32", shape=("B", 2))
    job = GraphJob("watched", Watched(), (spec,), (spec,), "fp32", {}.get, {}.get, lambda device: Watched(), {"B": 1})
    allowed = torch.backends.cudnn.allow_tf32
    arrays = reference_arrays(job, [{"B": 3}])
    assert arrays["watched/0/input/x"].any()
    assert not arrays["watched/0/output/x"].any()
    assert torch.backends.cudnn.allow_tf32 == allowed


def gate(pipeline, folder, graph: str, dtype="fp32", levels=(2,)) -> float:
    """Export one graph of a pipeline and let the gate judge it; returns the largest error."""
    flux = Flux(find_model(str(pipeline)), levels, dtype)
    weights = WeightFiles(folder)
    jobs = [job for job in flux.jobs() if job.name == graph]
    graphs = [export_graph(job, 23, weights) for job in jobs]
    weights.write()
    for one in graphs:
        one.save(folder, weights)
    results = check_bundle(flux, jobs, folder, load_profile("256"), 23, lambda _: None)
    return max(result.error for result in results)


def shift_the_latent(monkeypatch) -> None:
    usual = VaeDecoder.__init__

    def init(decoder, vae):
        usual(decoder, vae)
        decoder.shift = -decoder.shift

    monkeypatch.setattr(VaeDecoder, "__init__", init)


def turn_the_other_way(monkeypatch) -> None:
    usual = FluxLevel.run_block

    def run_block(level, block, tokens, context, embedding, rotary):
        return usual(level, block, tokens, context, embedding, (rotary[0], -rotary[1]))

    monkeypatch.setattr(FluxLevel, "run_block", run_block)


def take_the_first_token(monkeypatch) -> None:
    def forward(module, input_ids):
        return module.encoder(input_ids).last_hidden_state[:, 0].float()

    monkeypatch.setattr(ClipEncoder, "forward", forward)


def scale_the_states(monkeypatch) -> None:
    def forward(module, input_ids):
        return 1.0001 * module.encoder(input_ids)[0].float()

    monkeypatch.setattr(T5Encoder, "forward", forward)


def look_at_half_the_noise(monkeypatch) -> None:
    usual = FluxGate.forward

    def forward(module, latent, timestep, pooled, gate_input, guidance=None):
        return usual(module, latent, timestep / 2, pooled, gate_input, guidance)

    monkeypatch.setattr(FluxGate, "forward", forward)


@pytest.mark.parametrize(
    ("graph", "tensor", "spoil"),
    [
        ("vae_decoder", "image", shift_the_latent),
        ("level-2", "velocity", turn_the_other_way),
        ("clip", "pooled", take_the_first_token),
        ("t5", "context", scale_the_states),
        ("gate", "next_gate_input", look_at_half_the_noise),
    ],
)
def test_a_wrapper_that_computes_something_else_is_refused(tiny_pipeline, tmp_path, monkeypatch, graph, tensor, spoil):
    """References come from diffusers and transformers, not from what is exported: a mistake there is no excuse."""
    spoil(monkeypatch)
    with pytest.raises(ParityError, match=f"graph {graph} does not compute .* relative error of {tensor}"):
        gate(tiny_pipeline, tmp_path, graph)


def test_a_mistake_in_the_step_graph_is_refused(tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("ddit.exporter.steps.update.patch_deviation", lambda values, p: values[:, 0, ::p, ::p])
    with pytest.raises(ParityError, match="relative error of deviation_4"):
        gate(tiny_pipeline, tmp_path, "step", levels=(2, 4))


@torch.no_grad()
@pytest.mark.parametrize("post_quant_conv", [True, False])
def test_decoded_pixels_are_the_vae_s(tmp_path, post_quant_conv):
    """Also with the convolution before the decoder, which FLUX.1's VAE lacks and diffusers' default has."""
    folder = save_tiny_pipeline(tmp_path / "model", post_quant_conv=post_quant_conv)
    (tmp_path / "graphs").mkdir()
    assert gate(folder, tmp_path / "graphs", "vae_decoder") < 1e-5
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    assert (vae.post_quant_conv is not None) == post_quant_conv
    latent = torch.randn(1, CHANNELS, 6, 10)
    expected = vae.decode(latent / vae.config.scaling_factor + vae.config.shift_factor).sample
    engine = OnnxRuntimeEngine(open_session(tmp_path / "graphs" / "vae_decoder.onnx"), "vae_decoder")
    np.testing.assert_allclose(engine.run({"latent": latent.numpy()})["image"], expected, atol=1e-5)


@pytest.mark.parametrize("graph", ["level-2", "gate"])
def test_half_precision_is_held_to_float32(tiny_pipeline, tmp_path, graph):
    """Weights are rounded for the reference, the rest is not: an error is the graph's own."""
    error = gate(tiny_pipeline, tmp_path, graph, "fp16")
    assert 1e-5 < error < 2e-3


def test_the_whole_pipeline_was_compared(tiny_bundle):
    results = {r.tensor: r for r in Bundle.open(tiny_bundle).manifest.parity if r.graph == "pipeline"}
    assert set(results) == {"latent", "image"}
    assert all(0 < result.error < 1e-5 for result in results.values())


@pytest.mark.parametrize(
    "target",
    [
        "ddit.exporter.families.flux.model.ROPE_THETA",  # the graph takes its tables as inputs, and so does not mind
        "pad",
        "sigmas",
    ],
)
def test_what_only_shows_in_the_whole_is_refused(tiny_pipeline, tmp_path, monkeypatch, target):
    """The level with other tables, a tokenizer that fills up with another token, other noise levels."""
    from ddit.exporter import end_to_end

    if target == "pad":
        usual = Flux.save_tokenizers

        def save_tokenizers(flux, folder):
            return tuple(
                encoder.model_copy(update={"tokenizer": encoder.tokenizer.model_copy(update={"pad_id": 3})})
                for encoder in usual(flux, folder)
            )

        monkeypatch.setattr(Flux, "save_tokenizers", save_tokenizers)
    elif target == "sigmas":
        plain = end_to_end.sigmas
        monkeypatch.setattr(end_to_end, "sigmas", lambda sampler, steps, tokens: plain(sampler, steps, 10 * tokens))
    else:
        monkeypatch.setattr(target, 100.0)
    options = ("--levels", "2", "--dtype", "fp32", "--profile", "256", "--out", tmp_path / "out.bundle")
    result = run(main, "flux", "--model", tiny_pipeline, *options)
    assert result.exit_code == 1
    assert "does not compute what the model computes" in result.stderr
    assert not list(tmp_path.iterdir())
