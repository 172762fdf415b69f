"""Training the adapter of a model that makes clips and is guided by two passes."""

import csv
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from safetensors.torch import load_file

import train_adapter
from conftest import WAN_PROFILE, run
from ddit.exporter.adapter import load_adapter
from ddit.exporter.cli import main as export
from ddit.exporter.families.wan.model import Wan
from ddit.exporter.models import find_model
from ddit.runtime import Bundle
from training.states import Trajectories

SMALL = ("--frames", 5, "--height", 64, "--width", 64, "--text-length", 12, "--rank", 4, "--residual-width", 8,
         "--precision", "fp32", "--levels", "4", "--batch", 2, "--steps", "3-5", "--guidance", "3-6")  # fmt: skip
STEPS = 40
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle\ntwo blue stars on a striped background\n")
    return path


def train(model: Path, out: Path, *more: object):
    return run(train_adapter.main, "--model", model, "--out", out, *SMALL, *more)


@pytest.fixture(scope="module")
def trained(tiny_wan, prompts, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    options = ("--prompts", prompts, "--max-steps", STEPS, "--lr", 3e-3, "--negative-prompt", "small")
    result = train(tiny_wan, out, *options)
    assert result.exit_code == 0, result.output
    return out


def test_the_loss_goes_down(trained):
    with (trained / "log.csv").open(newline="") as file:
        first, *_, last = (float(row["level 4"]) for row in csv.DictReader(file))
    assert last < 0.9 * first


def test_the_adapter_is_exported_through_the_gate(trained, tiny_wan, tmp_path):
    adapter, out, profile = trained / "adapter.safetensors", tmp_path / "wan.bundle", tmp_path / "tiny.toml"
    assert load_adapter(adapter).family == "wan"
    profile.write_text(WAN_PROFILE)
    result = run(export, "wan", "--model", tiny_wan, "--levels", "2,4", "--adapter", adapter, "--dtype", "fp32",
                 "--profile", profile, "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "no adapter" not in result.stderr
    manifest = Bundle.open(out).manifest
    assert manifest.level(4).trained
    assert {"level-2", "level-4", "pipeline"} <= {check.graph for check in manifest.parity}


def test_an_interrupted_run_ends_as_if_it_had_not_been(tiny_wan, prompts, tmp_path, monkeypatch):
    options = ("--prompts", prompts, "--latents", "student", "--max-steps", 4, "--save-every", 2)
    assert train(tiny_wan, tmp_path / "whole", *options).exit_code == 0

    draw, drawn = Trajectories.draw, []

    def interrupted(self):
        drawn.append(1)
        if len(drawn) == 4:  # in the fourth step, with a checkpoint after the second
            raise KeyboardInterrupt
        return draw(self)

    monkeypatch.setattr(Trajectories, "draw", interrupted)
    assert train(tiny_wan, tmp_path / "parts", *options).exit_code != 0
    monkeypatch.setattr(Trajectories, "draw", draw)
    result = train(tiny_wan, tmp_path / "parts", *options)
    assert "going on after step 2" in result.output
    whole, parts = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_prompts_are_encoded_as_the_pipeline_encodes_them(tiny_wan):
    family = Wan(find_model(str(tiny_wan)), (4,), "fp32")
    texts = ["a red circle", "", "two blue stars on a striped background, a large green square on the right"]
    ours = family.text_encoder(12, CPU)(texts)
    pipeline = WanPipeline.from_pretrained(tiny_wan)
    with torch.no_grad():
        theirs, negative = pipeline.encode_prompt(texts, max_sequence_length=12)
        torch.testing.assert_close(ours, {"context": theirs})
        torch.testing.assert_close(ours["context"][1], negative[0])  # what no negative prompt is encoded as


def test_a_picture_becomes_the_latent_that_the_pipeline_would_decode(tiny_wan):
    family = Wan(find_model(str(tiny_wan)), (4,), "fp32")
    pictures = torch.rand(2, 3, 32, 64) * 2 - 1
    with torch.no_grad():
        latent = family.picture_encoder(CPU)(pictures)
        assert latent.shape == (2, 16, 1, 4, 8)
        vae = WanPipeline.from_pretrained(tiny_wan).vae
        encoded = vae.encode(pictures[:, :, None]).latent_dist.mode()
    deviation = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)  # as `WanPipeline.__call__` has it
    decodes = latent / deviation + torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(decodes, encoded)


def test_pictures_are_clips_of_one_frame(tiny_wan, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (80, 70), (90, 40, 200)).save(folder / "one.png")
    (folder / "one.txt").write_text("a red circle")
    result = train(tiny_wan, tmp_path / "run", "--latents", f"images:{folder}")
    assert result.exit_code == 2
    assert "pictures are no clips of 5 frames; add --frames 1" in result.output
    options = ("--latents", f"images:{folder}", "--frames", 1, "--max-steps", 1)
    assert train(tiny_wan, tmp_path / "run", *options).exit_code == 0


def test_random_weights_need_a_configuration_alone(tmp_path, tiny_wan):
    for component in ("transformer", "vae", "scheduler"):
        (tmp_path / "model" / component).mkdir(parents=True)
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        (tmp_path / "model" / component / name).write_bytes((tiny_wan / component / name).read_bytes())
    (tmp_path / "model" / "model_index.json").write_bytes((tiny_wan / "model_index.json").read_bytes())
    result = train(tmp_path / "model", tmp_path / "run", "--random-weights", "--max-steps", 1, "--precision", "bf16")
    assert result.exit_code == 0, result.output
    assert "random weights" in load_adapter(tmp_path / "run" / "adapter.safetensors").base_model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--frames", 8), "8 frames cannot be made"),
        (("--guidance", 1, "--negative-prompt", "small"), "a negative prompt needs guidance above 1; leave it out"),
    ],
)
def test_bad_input_is_one_line(tiny_wan, prompts, tmp_path, options, message):
    result = train(tiny_wan, tmp_path / "run", "--prompts", prompts, *options)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_model_of_pictures_takes_no_frames_and_no_negative_prompt(tiny_pipeline, prompts, tmp_path):
    options = ("--prompts", prompts, "--height", 64, "--width", 64, "--out", tmp_path / "run")
    for more, message in (
        (("--frames", 5), "this model makes pictures, which have no frames; leave --frames out"),
        (("--negative-prompt", "small"), "this model is not guided by a negative prompt; leave it out"),
    ):
        result = run(train_adapter.main, "--model", tiny_pipeline, *options, *more)
        assert result.exit_code == 2
        assert message in result.output


def test_a_pipeline_of_no_family_is_refused(prompts, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "ToyPipeline"}')
    result = train(tmp_path, tmp_path / "run", "--prompts", prompts)
    assert result.exit_code == 1
    assert result.output == f"error: {tmp_path} holds a ToyPipeline; ddit knows FluxPipeline and WanPipeline\n"
