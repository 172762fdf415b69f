"""A family is a type: a toy one registers itself and exports through the command line, with no change elsewhere."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from conftest import run
from ddit.exporter import families
from ddit.exporter.adapter import load_adapter, save_adapter
from ddit.exporter.cli import main
from ddit.exporter.families.base import Family, FamilyInfo
from ddit.exporter.families.flux.model import Flux
from ddit.exporter.graphs.job import floats, ids, level_name, loaded_job
from ddit.exporter.levels import Level, patchify, resize_embedding, resize_head, unpatchify
from ddit.exporter.models import find_model
from ddit.exporter.steps.jobs import sampling_jobs
from ddit.runtime import Bundle
from ddit.runtime.backends.registry import open_backend
from ddit.runtime.bundle.manifest import (
    AxisInfo,
    DecoderInfo,
    FlowMatchEulerInfo,
    GuidanceInfo,
    LatentInfo,
    RotaryAxis,
    RotaryInfo,
    TextEncoderInfo,
    TokenizerInfo,
)
from ddit.runtime.conditioning.positions import level_tables
from ddit.runtime.errors import AdapterError
from ddit.runtime.tools.samples import sample_inputs
from ddit.runtime.tools.verify import verify_graphs
from tiny import tiny_adapter_config, tiny_transformer

WORDS = ("<pad>", "a", "red", "blue", "circle", "square", "two", "small", "squares", "on", "striped", "background")
CHANNELS, WIDTH, DOWNSCALE, TEXT = 3, 8, 4, 6
SHIFT = 3.0


class ToyTransformer(nn.Module):
    """A velocity of each latent pixel (patch 1): embedding, rotary positions, the text's mean, and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(CHANNELS, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.head = nn.Linear(WIDTH, CHANNELS)

    def forward(self, latent: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Latent (B, 3, H, W), σ (B), text states (B, L, 8) → velocity (B, 3, H, W)."""
        hidden = self.embed(latent.permute(0, 2, 3, 1)) + self.time(sigma[:, None])[:, None, None]
        row = torch.arange(latent.shape[2]).float()[:, None].expand(latent.shape[2:])
        column = torch.arange(latent.shape[3]).float()[None].expand(latent.shape[2:])
        # two pairs turn with the row, two with the column; the second pair of each ten times slower
        angle = torch.stack([row, row / 10, column, column / 10], dim=-1)
        one, other = hidden.unflatten(-1, (4, 2)).unbind(-1)
        turned = [one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()]
        hidden = torch.stack(turned, dim=-1).flatten(-2)
        return self.head(torch.tanh(hidden + text.mean(1)[:, None, None])).permute(0, 3, 1, 2)


class ToyLevel(Level):
    """The transformer at a patch, with tables as inputs."""

    def __init__(self, transformer: ToyTransformer, patch: int):
        super().__init__()
        self.patch, self.dtype = patch, torch.float32
        self.trunk, self.embed, self.head = transformer, transformer.embed, transformer.head
        if patch > 1:
            self.embed, self.head = nn.Linear(CHANNELS * patch**2, WIDTH), nn.Linear(WIDTH, CHANNELS * patch**2)
            self.embed.weight.data = resize_embedding(transformer.embed.weight.data, 1, patch)
            self.embed.bias = transformer.embed.bias
            weight, bias = resize_head(transformer.head.weight.data, transformer.head.bias.data, 1, patch)
            self.head.weight.data, self.head.bias.data = weight, bias

    def forward(self, latent: Tensor, timestep: Tensor, states: Tensor, rope_cos: Tensor, rope_sin: Tensor) -> Tensor:
        tokens = self.embed(patchify(latent, self.patch)) + self.trunk.time(timestep[:, None])[:, None]
        swapped = tokens.unflatten(-1, (4, 2))
        swapped = torch.stack([-swapped[..., 1], swapped[..., 0]], dim=-1).flatten(-2)
        tokens = tokens * rope_cos.flatten(0, 1) + swapped * rope_sin.flatten(0, 1)
        tokens = self.head(torch.tanh(tokens + states.mean(1)[:, None]))
        return unpatchify(tokens, rope_cos.shape[0], rope_cos.shape[1], self.patch)


class ToyDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(CHANNELS, 3, 1)

    def forward(self, latent: Tensor) -> Tensor:
        return torch.tanh(self.mix(latent).repeat_interleave(DOWNSCALE, -2).repeat_interleave(DOWNSCALE, -1))


class ToyEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(len(WORDS), WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


PARTS = {"transformer": ToyTransformer, "decoder": ToyDecoder, "encoder": ToyEncoder}


@dataclass(frozen=True)
class Toy(Family):
    """A pipeline of three modules of a few numbers each."""

    pipeline = "ToyPipeline"
    native = 1
    feed_forward = ()
    attention = ()

    def part(self, name: str):
        module = PARTS[name]()
        module.load_state_dict(load_file(self.source.folder / name / "model.safetensors"))
        return module.eval()

    @property
    def latent(self):
        axes = (AxisInfo(name="height", downscale=DOWNSCALE), AxisInfo(name="width", downscale=DOWNSCALE))
        return LatentInfo(channels=CHANNELS, axes=axes)

    @property
    def positions(self):
        axes = (RotaryAxis(axis="height", dimensions=4), RotaryAxis(axis="width", dimensions=4))
        return RotaryInfo(axes=axes, theta=100.0)

    @property
    def guidance(self):
        return GuidanceInfo(kind="none", default=0.0)

    @property
    def sampler(self):
        return FlowMatchEulerInfo(
            use_dynamic_shifting=False, shift=SHIFT, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
            max_image_seq_len=4096, steps=4,
        )  # fmt: skip

    @property
    def decoder(self):
        return DecoderInfo(graph="pixels")

    def save_tokenizers(self, folder):
        (folder / "words.json").write_bytes((self.source.folder / "words.json").read_bytes())
        info = TokenizerInfo(file="words.json", length=TEXT, pad_id=0)
        return (TextEncoderInfo(graph="words", tokenizer=info, free_length=False, feeds={"out": "states"}),)

    def build_level(self, transformer, patch, config=None):
        return ToyLevel(transformer, patch)

    def level_job(self, patch):
        module = self.level(self.part("transformer"), patch)

        def original(device):
            transformer = self.part("transformer")
            if patch > 1:
                return self.level(transformer, patch)
            return lambda latent, timestep, states, rope_cos, rope_sin: transformer(latent, timestep, states)

        table = (f"H/{patch}", f"W/{patch}", WIDTH)
        return loaded_job(
            level_name(patch),
            module,
            inputs=(
                *(floats("latent", *self.latent.shape), floats("timestep", "B"), floats("states", "B", TEXT, WIDTH)),
                *(floats("rope_cos", *table), floats("rope_sin", *table)),
            ),
            outputs=(floats("velocity", *self.latent.shape),),
            dtype="fp32",
            original=original,
            trace_sizes={"B": 2, "H": 2 * patch, "W": 3 * patch},
            tables=lambda sizes: level_tables(self.positions, self.latent, self.native, patch, sizes),
        )

    def jobs(self):
        words = loaded_job(
            "words",
            self.part("encoder"),
            inputs=(ids("input_ids", "B", TEXT),),
            outputs=(floats("out", "B", TEXT, WIDTH),),
            dtype="fp32",
            original=lambda device: self.part("encoder"),
            trace_sizes={"B": 2},
            vocabulary=len(WORDS),
        )
        pixels = loaded_job(
            "pixels",
            self.part("decoder"),
            inputs=(floats("latent", *self.latent.shape),),
            outputs=(floats("image", "B", 3, f"H*{DOWNSCALE}", f"W*{DOWNSCALE}"),),
            dtype="fp32",
            original=lambda device: self.part("decoder"),
            trace_sizes={"B": 2, "H": 3, "W": 5},
        )
        coarse = tuple(patch for patch in self.levels if patch > 1)
        return [
            words,
            *map(self.level_job, self.levels),
            *sampling_jobs(self.latent, 1, coarse, self.sampler, self.guidance),
            pixels,
        ]

    @torch.no_grad()
    def original_step(self, prompts, latent, *, steps, guidance, text_length, device):
        rows = [[WORDS.index(word) for word in prompt.split()][:TEXT] for prompt in prompts]
        states = self.part("encoder")(torch.tensor([row + [0] * (TEXT - len(row)) for row in rows]))
        plain = 1 - 1 / steps
        then = SHIFT * plain / (1 + (SHIFT - 1) * plain)
        start = torch.from_numpy(latent)
        end = start + (then - 1) * self.part("transformer")(start, torch.ones(len(start)), states)
        return {"latent": end.numpy(), "image": self.part("decoder")(end).numpy()}


@pytest.fixture
def toy(monkeypatch) -> None:
    """The family, known for as long as a test lasts."""
    info = FamilyInfo("toy", "Toy", "nobody/toy", (1, 3), "fp32", "256", load=lambda: Toy)
    monkeypatch.setattr(Toy, "info", info, raising=False)
    monkeypatch.setattr(families, "_registry", {**families._registry})
    families.register(info)


@pytest.fixture
def toy_pipeline(tmp_path) -> Path:
    folder = tmp_path / "model"
    for name, part in PARTS.items():
        (folder / name).mkdir(parents=True)
        save_file(part().state_dict(), folder / name / "model.safetensors")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "words.json"))
    return folder


@pytest.mark.usefixtures("toy")
def test_a_toy_family_exports_and_its_graphs_run(toy_pipeline, tmp_path):
    out = tmp_path / "toy.bundle"
    result = run(main, "toy", "--model", toy_pipeline, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "no adapter for level 3" in result.stderr
    bundle = Bundle.open(out)
    manifest = bundle.manifest
    assert (manifest.family, manifest.native, manifest.patches) == ("toy", 1, (1, 3))
    assert manifest.decoder.graph == "pixels"
    assert {result.graph for result in manifest.parity} == {*manifest.graphs, "pipeline"}
    assert all(result.checked == "full" for result in manifest.parity)
    backend = open_backend("cpu", bundle)
    for name, info in manifest.graphs.items():
        outputs = backend.engine(name).run(sample_inputs(info.inputs, {"B": 3, "H": 15, "W": 9}))
        for spec in info.outputs:
            assert outputs[spec.name].shape == spec.resolve({"B": 3, "H": 15, "W": 9})
            assert np.isfinite(outputs[spec.name]).all()
    checks = [*verify_graphs(backend)]
    assert {check.graph for check in checks} == set(manifest.graphs)
    assert all(check.passed for check in checks)


@pytest.mark.usefixtures("toy")
def test_the_command_s_help_is_the_family_s():
    listed = run(main, "--help").stdout
    assert "Export a Toy pipeline." in listed
    assert "Export a FLUX.1 pipeline." in listed
    text = " ".join(run(main, "toy", "--help").stdout.split())
    assert "nobody/toy" in text
    assert "[default: the model's, or 1,3]" in text
    assert "[default: the model's, or fp32]" in text
    assert "the model's, or 2,4]" in " ".join(run(main, "flux", "--help").stdout.split())


@pytest.mark.usefixtures("toy")
def test_another_family_s_pipeline_is_refused(toy_pipeline, tmp_path):
    result = run(main, "flux", "--model", toy_pipeline, "--out", tmp_path / "out.bundle")
    assert result.exit_code == 1
    assert "holds a ToyPipeline; family flux exports a FluxPipeline" in result.stderr


def test_another_family_s_adapter_is_refused(tiny_pipeline, tmp_path):
    level = Flux(find_model(str(tiny_pipeline)), (2, 4), "fp32").build_level(
        tiny_transformer(), 4, tiny_adapter_config(rank=4)
    )
    path = tmp_path / "a.safetensors"
    save_adapter(path, {4: level}, base_model="tiny", family="toy")
    with pytest.raises(AdapterError, match=r"is an adapter for family toy, not flux; choose another --adapter"):
        Flux(find_model(str(tiny_pipeline)), (2, 4), "fp32", load_adapter(path))


def test_families_are_found_by_name():
    assert families.find_family("flux") is Flux
    assert [info.name for info in families.families()] == ["flux", "wan"]
