"""The evaluation from the outside: what it makes, what it does not make again, what it writes, and how it fails."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import evaluate
import prompts
from conftest import run
from ddit.runtime import Pipeline, Result
from ddit.runtime.trace import StepRecord, Trace
from demo_model.scenes import balanced_scenes
from evaluation import measure, metrics, report, store
from evaluation.samples import read_samples

SIZE = ("--height", 64, "--width", 64)
STEPS = ("--steps", 4)
SCHEDULES = ("--schedule", "dynamic:tau=1e9", "--schedule", "fixed:8x1,4x1,2x2")
NAMES = ("native", "dynamic:tau=1e9", "fixed:8x1,4x1,2x2")


@pytest.fixture(autouse=True)
def _few_scenes(monkeypatch):
    monkeypatch.setattr(measure, "DATA_SCENES", 20)


@pytest.fixture(scope="module")
def finished(tiny_bundle, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a finished run over three scenes, and what was said."""
    out = tmp_path_factory.mktemp("evaluate") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "DATA_SCENES", 20)
        result = run(evaluate.main, tiny_bundle, "--prompts", "scenes:3", *SIZE, *STEPS, *SCHEDULES, "--out", out)
    assert result.exit_code == 0, result.stderr
    return out, result.stderr


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_row_a_schedule_with_intervals(finished):
    rows = {row["schedule"]: row for row in read(finished[0] / "results.csv")}
    assert tuple(rows) == NAMES
    for column in ("coarse_share", "compute_speedup", "wall_speedup", "psnr", "ssim", "adherence_minus_native"):
        for name in NAMES[1:]:
            low, value, high = (float(rows[name][column + end]) for end in ("_low", "", "_high"))
            assert low <= value <= high, column
    for name in NAMES:
        assert float(rows[name]["frechet"]) >= 0
        assert rows[name]["pictures"] == "3"
    native, dynamic, fixed = rows.values()
    assert (native["compute_speedup"], native["wall_speedup"], native["frechet_share"]) == ("1", "1", "1")
    assert native["psnr"] == native["adherence_minus_native"] == ""
    assert float(dynamic["coarse_share"]) == float(dynamic["coarse_share_busy"]) == 0.25  # after three native steps
    assert float(fixed["coarse_share_plain"]) == 0.5
    assert float(fixed["compute_speedup"]) > float(dynamic["compute_speedup"]) > 1


def test_a_row_a_picture(finished):
    rows = read(finished[0] / "pictures.csv")
    assert [row["schedule"] for row in rows] == [name for name in NAMES for _ in range(3)]
    assert [row["kind"] for row in rows[:3]] == ["plain", "busy", "plain"]
    assert {row["seed"] for row in rows} == {"0", "1", "2"}
    for row in rows:
        assert Image.open(finished[0] / row["file"]).size == (64, 64)
        assert float(row["tflop"]) > 0
        assert float(row["milliseconds"]) > 0
        assert {row[name] for name in ("adherence", "shape", "colour", "background", "count")} <= {"0", "1"}
    assert rows[0]["ssim"] == ""
    assert -1 <= float(rows[3]["ssim"]) <= 1


def test_the_report_holds_the_table_the_run_and_what_was_left_out(finished):
    text = (finished[0] / "report.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(NAMES)
    assert len({line.count("|") for line in table}) == 1
    for heading in ("coarse steps", "compute", "wall clock", "adherence ↑", "PSNR to native, dB ↑", "÷ native"):
        assert f"| {heading} |" in table[0]
    for words in ("machine: ", "onnxruntime ", "command: `python", "GFLOP", "the floor at this number"):
        assert words in text
    left_out = text.split("## Not measured")[1]
    for name in ("lpips", "fid", "clip", "imagereward"):
        assert f"* {name} needs" in left_out


def test_plot_and_grid_are_pictures(finished):
    assert Image.open(finished[0] / "plot.png").width > 1000
    width, height = Image.open(finished[0] / "grid.png").size
    assert width > 3 * 190
    assert height > 3 * 190


def test_what_is_there_is_not_made_again(finished, tiny_bundle, monkeypatch):
    out, said = finished
    assert "0 of 9 pictures are there already, 9 to make" in said
    before = {path: path.read_bytes() for path in (out / "pictures").rglob("*.*")}
    assert len(before) == 18

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("everything is there")

    monkeypatch.setattr(Pipeline, "batch", fail)
    options = ("--prompts", "scenes:3", *SIZE, *STEPS, *SCHEDULES, "--metric", "psnr", "--out", out)
    result = run(evaluate.main, tiny_bundle, *options)
    assert result.exit_code == 0, result.stderr
    assert "9 of 9 pictures are there already, 0 to make" in result.stderr
    assert {path: path.read_bytes() for path in (out / "pictures").rglob("*.*")} == before


def test_pictures_of_another_run_can_be_the_reference(finished, tiny_bundle, tmp_path):
    """As of another backend: then the native schedule is compared as well, here with itself."""
    options = ("--prompts", "scenes:3", *SIZE, *STEPS, "--schedule", "fixed:8x1,4x1,2x2", "--metric", "ssim")
    result = run(evaluate.main, tiny_bundle, *options, "--out", tmp_path / "out", "--against", finished[0])
    assert result.exit_code == 0, result.stderr
    native, fixed = read(tmp_path / "out" / "results.csv")
    assert float(native["ssim"]) == pytest.approx(1)
    assert 0 < float(fixed["ssim"]) < 0.999
    assert f"the native ones in `{finished[0]}`" in (tmp_path / "out" / "report.md").read_text()
    result = run(evaluate.main, tiny_bundle, *options, "--out", tmp_path / "more", "--against", tmp_path / "none")
    assert result.exit_code == 2
    assert "lacks native pictures of these prompts" in result.stderr


def test_only_what_is_missing_is_made(tiny_bundle, tmp_path, monkeypatch):
    out = tmp_path / "out"
    options = (*SIZE, *STEPS, "--schedule", "dynamic:tau=1e9", "--metric", "psnr", "--batch", 2, "--out", out)
    assert run(evaluate.main, tiny_bundle, "--prompts", "scenes:2", *options).exit_code == 0
    lost = next((out / "pictures" / "dynamic-tau=1e9-4-steps").glob("*.json"))
    record = json.loads(lost.read_text())
    lost.unlink()  # as if the run had been stopped between picture and record
    asked = []
    batch = Pipeline.batch
    monkeypatch.setattr(
        Pipeline, "batch", lambda self, prompts, **kw: asked.append(prompts) or batch(self, prompts, **kw)
    )
    result = run(evaluate.main, tiny_bundle, "--prompts", "scenes:2", *options)
    assert result.exit_code == 0, result.stderr
    assert asked == [["warm up"], [record["prompt"]]]
    assert json.loads(lost.read_text())["levels"] == [2, 2, 2, 8]


def test_a_folder_with_other_pictures_is_refused(finished, tiny_bundle):
    other = ("--height", 128, "--width", 64, *STEPS, "--out", finished[0])
    result = run(evaluate.main, tiny_bundle, "--prompts", "scenes:3", *other)
    assert result.exit_code == 2
    assert "holds pictures made with height 64, not 128; choose another --out" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_prompts_from_a_file(tiny_bundle, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n  a blue star  \n")
    options = ("--schedule", "dynamic:tau=1e9", *SIZE, *STEPS, "--seeds", 2, "--out", tmp_path / "out")
    result = run(evaluate.main, tiny_bundle, "--prompts", prompts, *options)
    assert result.exit_code == 0, result.stderr
    rows = read(tmp_path / "out" / "pictures.csv")
    assert [(row["prompt"], row["seed"]) for row in rows[:4]] == [
        ("a red circle", "0"),
        ("a red circle", "10000"),
        ("a blue star", "1"),
        ("a blue star", "10001"),
    ]
    (native, _) = read(tmp_path / "out" / "results.csv")
    assert "adherence" not in native
    assert "coarse_share_plain" not in native
    assert "adherence is judged by the scene classifier" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("name", ["lpips", "fid", "clip", "imagereward"])
def test_missing_weights_end_before_anything_is_made(tiny_bundle, tmp_path, monkeypatch, name):
    monkeypatch.setattr(metrics, "find_spec", lambda package: object())
    monkeypatch.setattr(metrics, "in_hub_cache", lambda *_: False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ("--prompts", "scenes:2", "--metric", "psnr", "--metric", name, "--out", tmp_path / "out")
    result = run(evaluate.main, tiny_bundle, *options)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {name} needs pretrained weights that are not here")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompts", "scenes:none"), "write scenes:N"),
        (("--prompts", "scenes:7-7"), "write scenes:N"),
        (("--prompts", "clips:x"), "write clips:N"),
        (("--prompts", "clips:4", "--background", "noisy"), "--background chooses among scenes"),
        (("--prompts", "scenes:1", "--background", "dotted"), "none of scenes:1 has a dotted background"),
        (("--prompts", __file__, "--background", "dotted"), "--background chooses among scenes"),
        (("--prompts", "no-such-file"), "no-such-file cannot be read"),
        (("--prompts", "scenes:2", "--schedule", "sometimes"), "unknown schedule"),
        (("--prompts", "scenes:2", "--steps", 4, "--schedule", "fixed:2x3"), "has 3 steps, not 4"),
        (("--prompts", "scenes:2", "--height", 100), "nearest: 64 or 128"),
        (("--prompts", "scenes:1", "--metric", "frechet"), "needs two pictures or more"),
        (("--prompts", "scenes:20", "--metric", "psnr", "--batch", 20), "outside the bundle's profile"),
    ],
)
def test_bad_requests_end_in_one_line(tiny_bundle, tmp_path, arguments, words):
    result = run(evaluate.main, tiny_bundle, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_longer_list_of_scenes_goes_on_from_a_shorter_one():
    scenes = balanced_scenes(12, 5)
    assert [scene.plain for scene in scenes] == [True, False] * 6
    assert balanced_scenes(7, 5) == scenes[:7]
    assert read_samples("scenes:12", 1)[:4] == read_samples("scenes:4", 1)
    assert read_samples("scenes:12", 2)[8:] == read_samples("scenes:4-12", 2)
    printed = run(prompts.main, "scenes:4-12").stdout.splitlines()
    assert printed == [one.prompt for one in read_samples("scenes:4-12", 1)]
    dotted = read_samples("scenes:40", 1, "dotted")
    assert dotted == [one for one in read_samples("scenes:40", 1) if one.scene.background == "dotted"] != []


def test_pictures_that_ran_together_share_the_time():
    def result(*levels: int) -> Result:
        steps = [StepRecord(i, 1.0, level, 10.0 * level, {}) for i, level in enumerate(levels)]
        return Result((Image.new("RGB", (1, 1)),), Trace("", 0, 1, 1, 0.0, 0.0, "cpu", {}, steps), None)

    assert store.shares([result(2, 2), result(2, 4), result(2, 4)]) == pytest.approx(
        [20 / 3 + 20, 20 / 3 + 20, 20 / 3 + 20]
    )
    assert store.shares([result(2, 4)]) == [60.0]


def test_a_step_at_a_smaller_size_counts_as_what_it_is():
    def result(*scales: float) -> Result:
        steps = [StepRecord(i, 1.0, 2, 12.0, {}, scale=one, size=(64, 64)) for i, one in enumerate(scales)]
        return Result((Image.new("RGB", (1, 1)),), Trace("", 0, 128, 128, 0.0, 0.0, "cpu", {}, steps), None)

    assert store.shares([result(0.5, 1.0), result(1.0, 1.0)]) == [18.0, 18.0]
    record = store.Record("", 0, "progressive", [2, None, 2, 4], 1.0, {"0": [64, 64], "1": [64, 64]})
    facts = SimpleNamespace(flops={2: 100.0, 4: 30.0}, smaller={(64, 64): {2: 20.0, 4: 8.0}})
    assert report.computed(report.Measured("progressive", [record], {}, {}), facts) == [20.0 + 100.0 + 30.0]


def test_clips_are_kept_whole_and_measured_frame_by_frame(wan_bundle, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a red circle\na blue star\n")
    options = ("--prompts", prompts, "--frames", 5, *SIZE, "--steps", 4, "--schedule", "fixed:4x2,2x2", "--out", out)
    measured = ("--metric", "psnr", "--metric", "ssim")
    result = run(evaluate.main, wan_bundle, *options, *measured)
    assert result.exit_code == 0, result.stderr
    native, fixed = read(out / "results.csv")
    rows = read(out / "pictures.csv")
    ours = Pipeline.open(wan_bundle)("a red circle", seed=0, schedule="native", steps=4, frames=5, height=64, width=64)
    clips = [np.asarray(Image.open(out / row["file"])).reshape(5, 64, 64, 3) for row in rows]
    assert np.array_equal(clips[0], np.stack([np.asarray(frame) for frame in ours.frames]))
    for name in ("psnr", "ssim"):
        values = [
            np.mean([getattr(metrics, name)(*pair) for pair in zip(clip, other, strict=True)])
            for clip, other in zip(clips[2:], clips[:2], strict=True)
        ]
        assert [float(row[name]) for row in rows[2:]] == pytest.approx(values, rel=1e-4)
        assert float(fixed[name]) == pytest.approx(np.mean(values), rel=1e-4)
    assert float(fixed["compute_speedup"]) > 1
    assert native["pictures"] == "2"
    text = (out / "report.md").read_text()
    assert "4 steps, 5 frames of 64×64 pixels" in text
    assert "A clip's metrics are means over its frames." in text
    assert Image.open(out / "grid.png").width > 2 * 3 * report.GRID_SIDE  # three frames of each, two schedules
    other = (*options[:3], 9, *options[4:])
    result = run(evaluate.main, wan_bundle, *other, *measured)
    assert result.exit_code == 2
    assert "holds pictures made with frames 5, not 9; choose another --out" in result.stderr


def test_coarse_steps_are_told_for_every_kind_of_clip(wan_bundle, tmp_path):
    options = ("--frames", 5, *SIZE, "--steps", 4, "--schedule", "fixed:4x2,2x2", "--metric", "ssim")
    result = run(evaluate.main, wan_bundle, "--prompts", "clips:0-2", *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    _, fixed = read(tmp_path / "out" / "results.csv")
    assert float(fixed["coarse_share_still_plain"]) == float(fixed["coarse_share_moving_busy"]) == 0.5
    assert [row["kind"] for row in read(tmp_path / "out" / "pictures.csv")[:2]] == ["still, plain", "moving, busy"]
    report_lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert "still, plain clips | moving, busy clips" in report_lines[2]
