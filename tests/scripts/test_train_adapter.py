"""Training adapters from the outside: what comes out fits, interrupted runs go on, bad input is one line."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_adapter
from conftest import run
from ddit.exporter.adapter import load_adapter
from ddit.exporter.cli import main as export
from ddit.runtime import Bundle
from training.states import Trajectories
from training.trainee import Trainee

PROMPTS = ("a red circle", "two blue stars on a striped background", "a large green square")
SMALL = ("--height", 64, "--width", 64, "--text-length", 12, "--rank", 4, "--residual-width", 8, "--precision", "fp32")
STEPS = 6


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def train(model: Path, out: Path, *more: object, small: tuple = SMALL):
    options = ("--levels", "4,8", "--max-steps", STEPS, "--save-every", 2, "--batch", 2, "--steps", "3-5", "--lr", 1e-3)
    return run(train_adapter.main, "--model", model, "--out", out, *options, *small, *more)


@pytest.fixture(scope="module")
def trained(tiny_pipeline, prompts, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    result = train(tiny_pipeline, out, "--prompts", prompts)
    assert result.exit_code == 0, result.output
    return out


def losses(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_adapter_is_what_the_exporter_takes(trained, tiny_pipeline, tmp_path):
    adapter = trained / "adapter.safetensors"
    result = run(export, "flux", "--model", tiny_pipeline, "--levels", "2,4,8", "--adapter", adapter, "--dtype", "fp32",
                 "--profile", "256", "--out", tmp_path / "a.bundle")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "untrained" not in result.stderr
    assert all(level.trained for level in Bundle.open(tmp_path / "a.bundle").manifest.levels)


def test_the_log_has_a_loss_per_level(trained):
    (*_, last) = losses(trained)
    assert int(last["step"]) == STEPS
    assert {"seconds", "steps per second", "level 4", "level 8"} < set(last)
    assert float(last["level 8"]) > 0


def test_every_part_of_every_level_learns(trained):
    changed = load_file(trained / "adapter.safetensors")
    for patch in (4, 8):
        for part in ("identity", "residual.conv_out.weight", "single_transformer_blocks.0.proj_mlp.lora_B.weight"):
            assert changed[f"level_{patch}.{part}"].abs().max() > 0  # they start at zero


@pytest.mark.parametrize("latents", ["teacher", "student"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(tiny_pipeline, prompts, tmp_path, monkeypatch, latents):
    options = ("--prompts", prompts, "--latents", latents)
    assert train(tiny_pipeline, tmp_path / "whole", *options).exit_code == 0

    draw, drawn = Trajectories.draw, []

    def interrupted(self):
        drawn.append(1)
        if len(drawn) == 4:  # in the fourth step, with a checkpoint after the second
            raise KeyboardInterrupt
        return draw(self)

    monkeypatch.setattr(Trajectories, "draw", interrupted)
    assert train(tiny_pipeline, tmp_path / "parts", *options).exit_code != 0
    monkeypatch.setattr(Trajectories, "draw", draw)
    result = train(tiny_pipeline, tmp_path / "parts", *options)
    assert result.exit_code == 0, result.output
    assert "going on after step 2" in result.output
    whole, parts = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_longer_training_goes_on(trained, tiny_pipeline, prompts, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    result = train(tiny_pipeline, tmp_path / "run", "--prompts", prompts, "--max-steps", STEPS + 2)
    assert f"going on after step {STEPS}" in result.output
    assert [int(row["step"]) for row in losses(tmp_path / "run")][-1] == STEPS + 2


def test_gradients_add_up_and_checkpointing_changes_nothing(tiny_pipeline, prompts, tmp_path):
    """Two halves of a batch make the step that the whole makes; recomputed activations are the same."""
    options = ("--prompts", prompts, "--max-steps", 1, "--steps", 4)
    assert train(tiny_pipeline, tmp_path / "plain", *options).exit_code == 0
    assert train(tiny_pipeline, tmp_path / "less", *options, "--gradient-checkpointing").exit_code == 0
    plain, less = (load_file(tmp_path / name / "adapter.safetensors") for name in ("plain", "less"))
    for name, tensor in plain.items():
        torch.testing.assert_close(less[name], tensor, atol=1e-6, rtol=1e-5)
    result = train(tiny_pipeline, tmp_path / "two", *options, "--accumulate", 2)
    assert result.exit_code == 0, result.output


def test_pictures_of_a_folder(tiny_pipeline, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, prompt in enumerate(PROMPTS):
        Image.new("RGB", (80 + number, 70), (number * 90, 40, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(prompt)
    result = train(tiny_pipeline, tmp_path / "run", "--latents", f"images:{folder}")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "run" / "encoded").glob("pictures-*"))) == 1

    (folder / "1.txt").unlink()
    result = train(tiny_pipeline, tmp_path / "other", "--latents", f"images:{folder}")
    assert result.exit_code == 2
    assert "1.png has no caption; write it into 1.txt beside it" in result.output


def test_parts_can_be_left_out(tiny_pipeline, prompts, tmp_path):
    """The comparison of an adapter's parts needs adapters without one."""
    small = SMALL[:6]
    bare = ("--rank", 0, "--residual-width", 0, "--no-identity", "--no-resize", "--precision", "fp32")
    result = train(tiny_pipeline, tmp_path / "bare", "--prompts", prompts, *bare, small=small)
    assert result.exit_code == 0, result.output
    adapter = load_adapter(tmp_path / "bare" / "adapter.safetensors")
    ends = {name.split(".", 1)[1] for name in adapter.tensors}
    assert ends == {"embed.weight", "embed.bias", "head.weight", "head.bias"}


def test_an_adapter_can_start_from_another(trained, tiny_pipeline, prompts, tmp_path):
    start = ("--start", trained / "adapter.safetensors")
    result = train(tiny_pipeline, tmp_path / "on", "--prompts", prompts, "--max-steps", 1, "--lr", 1e-9, *start)
    assert result.exit_code == 0, result.output
    before, after = (load_file(path / "adapter.safetensors") for path in (trained, tmp_path / "on"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)
    other = (*SMALL[:6], "--rank", 8, "--residual-width", 8, "--precision", "fp32")
    result = train(tiny_pipeline, tmp_path / "odd", "--prompts", prompts, *start, small=other)
    assert result.exit_code == 1
    assert "does not fit the model" in result.output


def test_random_weights_need_a_configuration_alone(tiny_pipeline, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_pipeline, model, ignore=shutil.ignore_patterns("*.safetensors"))
    result = train(model, tmp_path / "run", "--random-weights", "--max-steps", 2)
    assert result.exit_code == 0, result.output
    assert "random weights" in load_adapter(tmp_path / "run" / "adapter.safetensors").base_model
    assert "peak memory" in result.output


def test_diverged_training_keeps_the_last_good_adapter(trained, tiny_pipeline, prompts, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    before = (out / "adapter.safetensors").read_bytes()
    save = Trainee.save

    def spoiled(self):
        with torch.no_grad():
            self.distillation.own[0].fill_(float("nan"))
        save(self)

    monkeypatch.setattr(Trainee, "save", spoiled)
    result = train(tiny_pipeline, out, "--prompts", prompts, "--max-steps", STEPS + 2)
    assert result.exit_code == 1
    assert "training diverged" in result.output
    assert (out / "adapter.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--levels", "2,4", "--prompts", "scenes:2"), 2, "level 2 is the base model and needs no training"),
        (("--prompts", "nowhere.txt"), 2, "nowhere.txt cannot be read; give a text file with a prompt a line"),
        (("--prompts", "scenes:none"), 2, "write scenes:N"),
        ((), 2, "--prompts is missing"),
        (("--prompts", "scenes:2", "--height", 72), 2, "height 72 is not a multiple of 64"),
        (("--prompts", "scenes:2", "--latents", "dreams"), 2, "unknown latents 'dreams'"),
        (("--prompts", "scenes:2", "--latents", "images:nowhere"), 2, "captions lie beside the pictures"),
        (("--latents", "images:nowhere"), 2, "nowhere is not a folder"),
        (("--prompts", "scenes:2", "--random-weights"), 2, "random weights know no words"),
        (("--prompts", "scenes:2", "--steps", "5-3"), 2, "give a number of 1 or more, or a range"),
    ],
)
def test_bad_input_is_one_line(tiny_pipeline, tmp_path, options, code, message):
    result = train(tiny_pipeline, tmp_path / "run", *options)
    assert result.exit_code == code
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_model_without_guidance_takes_none(tiny_schnell, prompts, tmp_path):
    result = train(tiny_schnell, tmp_path / "run", "--prompts", prompts, "--guidance", 3)
    assert result.exit_code == 2
    assert "takes no guidance scale" in result.output
    assert train(tiny_schnell, tmp_path / "run", "--prompts", prompts, "--max-steps", 1).exit_code == 0


def test_a_folder_belongs_to_one_run(trained, tiny_pipeline, prompts):
    other = (*SMALL[:6], "--rank", 2, "--residual-width", 8, "--precision", "fp32")
    result = train(tiny_pipeline, trained, "--prompts", prompts, small=other)
    assert result.exit_code == 2
    assert "holds a run with rank 4, not 2; choose another --out" in result.output
