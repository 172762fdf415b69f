"""ddit-run generate --prompts: every picture is the one that is made alone, once, and whole."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import run
from ddit.runtime import Pipeline
from ddit.runtime.batch import make as making
from ddit.runtime.batch.lines import read_lines
from ddit.runtime.batch.make import make
from ddit.runtime.cli import main
from ddit.runtime.errors import BackendError, NotFiniteError, UsageError
from ddit.runtime.pipeline import Result
from ddit.runtime.serving.engine_room import EngineRoom
from fake_engines import fake_pipeline

LINES = [
    {"prompt": "a red circle", "seed": 3, "id": "circle", "schedule": "adaptive"},
    {"prompt": "a blue square on a striped background", "seed": 4, "schedule": "dynamic:tau=1e9", "size": "128x64"},
    {"prompt": "two large green stars", "schedule": "native", "steps": 5, "file": "stars.bmp"},
    {"prompt": "a red circle", "seed": 5, "schedule": "native", "steps": 12},
]


def write(folder: Path, lines) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def generate(bundle, prompts, out, *options):
    result = run(main, "generate", bundle, "--prompts", prompts, "--out", out, "--backend", "cpu", "--json", *options)
    return result, json.loads(result.stdout) if result.stdout else None


def test_every_picture_is_the_one_that_is_made_alone(tiny_bundle, tmp_path):
    prompts, out = write(tmp_path, LINES), tmp_path / "out"
    result, report = generate(tiny_bundle, prompts, out, "--steps", 8, "--height", 64, "--width", 64)
    assert result.exit_code == 0, result.stderr
    assert report == {"out": str(out), "made": 4, "kept": 0, "failed": 0}
    found = records(out)
    assert [(one["id"], one["file"]) for one in found] == [
        ("circle", "circle.png"), ("00002", "00002.png"), ("00003", "stars.bmp"), ("00004", "00004.png")
    ]  # fmt: skip
    pipeline = Pipeline.open(tiny_bundle, backend="cpu")
    for line, record in zip(LINES, found, strict=True):
        width, height = map(int, line.get("size", "64x64").split("x"))
        steps = line.get("steps", 8)
        alone = pipeline(line["prompt"], seed=line.get("seed", 0), steps=steps, schedule=line["schedule"],
                         height=height, width=width)  # fmt: skip
        with Image.open(out / record["file"]) as picture:
            difference = np.abs(np.asarray(picture, float) - np.asarray(alone.image, float))
        assert difference.max() <= 1
        assert record["seed"] == line.get("seed", 0)
        assert (record["height"], record["width"]) == (height, width)
        assert record["steps_per_level"] == {str(k): v for k, v in alone.trace.steps_per_level().items()}


def test_what_is_there_is_not_made_again(tiny_bundle, tmp_path):
    prompts, out = write(tmp_path, LINES[:3]), tmp_path / "out"
    small = ("--height", 64, "--width", 64, "--steps", 4)
    assert generate(tiny_bundle, prompts, out, *small)[0].exit_code == 0
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir() if file.suffix != ".jsonl"}
    (out / "stars.bmp").unlink()
    prompts = write(tmp_path, [*LINES[:3], {"prompt": "a star", "id": "last"}])
    result, report = generate(tiny_bundle, prompts, out, *small)
    assert (report["made"], report["kept"]) == (2, 2)
    assert [one["id"] for one in records(out)] == ["circle", "00002", "00003", "last"]
    for name in ("circle.png", "00002.png"):
        assert (out / name).stat().st_mtime_ns == before[name]
    other = write(tmp_path, [{**LINES[0], "prompt": "a blue circle"}])
    result, _ = generate(tiny_bundle, other, out, *small)
    assert result.exit_code == 2
    assert "was made from another prompt or options than line 1 now has" in result.stderr
    (out / "results.jsonl").write_text("somebody else's\n")
    result, _ = generate(tiny_bundle, prompts, out, *small)
    assert result.exit_code == 2
    assert "line 1 is not one that ddit-run wrote" in result.stderr


def test_a_killed_run_goes_on(tiny_bundle, tmp_path):
    lines = [{"prompt": "a red circle", "seed": seed} for seed in range(24)]
    prompts, out = write(tmp_path, lines), tmp_path / "out"
    options = ("--schedule", "native", "--steps", "40", "--in-flight", "3", "--height", "64", "--width", "64")
    command = [sys.executable, "-c", "from ddit.runtime.cli import main; main()", "generate", str(tiny_bundle),
               "--prompts", str(prompts), "--out", str(out), "--backend", "cpu", *options]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as killed:
        until = time.monotonic() + 60
        while not (out / "results.jsonl").exists() or len((out / "results.jsonl").read_bytes().split(b"\n")) < 6:
            assert killed.poll() is None
            assert time.monotonic() < until
            time.sleep(0.002)
        os.kill(killed.pid, signal.SIGKILL)
    with (out / "results.jsonl").open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        assert file.read() == b"\n"
        file.write(b'{"id": "00024", "fi')  # as if it had died while it wrote
    finished = {one["file"]: (out / one["file"]).stat().st_mtime_ns for one in map(json.loads, whole_lines(out))}
    assert 5 <= len(finished) < 24
    for file in out.glob("[!.]*.png"):
        Image.open(file).load()  # no half-written one
    result, report = generate(tiny_bundle, prompts, out, *options)
    assert result.exit_code == 0, result.stderr
    assert (report["made"], report["kept"]) == (24 - len(finished), len(finished))
    assert all((out / name).stat().st_mtime_ns == when for name, when in finished.items())
    assert [one["seed"] for one in records(out)] == [*range(24)]
    assert len({(out / one["file"]).read_bytes() for one in records(out)}) == 24


def whole_lines(out: Path) -> list[bytes]:
    return (out / "results.jsonl").read_bytes().split(b"\n")[:-1]


def test_two_do_not_write_one_folder(tiny_bundle, tmp_path):
    from ddit.runtime.folders import locked

    prompts, out = write(tmp_path, LINES), tmp_path / "out"
    out.mkdir()
    with locked(out):
        result, _ = generate(tiny_bundle, prompts, out)
    assert result.exit_code == 2
    assert "another process is writing" in result.stderr


def test_where_memory_is_short_they_are_made_in_turn(tiny_bundle, tmp_path, monkeypatch):
    from ddit.runtime.backends.onnxruntime.host import OnnxRuntimeBackend

    prompts, small = write(tmp_path, LINES), ("--height", 64, "--width", 64, "--steps", 8)
    assert generate(tiny_bundle, prompts, tmp_path / "together", *small)[0].exit_code == 0
    monkeypatch.setattr(OnnxRuntimeBackend, "low_memory", True)
    result, report = generate(tiny_bundle, prompts, tmp_path / "in turn", *small)
    assert result.exit_code == 0, result.stderr
    assert report["made"] == 4
    for record in records(tmp_path / "together"):
        with (
            Image.open(tmp_path / "together" / record["file"]) as one,
            Image.open(tmp_path / "in turn" / record["file"]) as other,
        ):
            assert np.abs(np.asarray(one, float) - np.asarray(other, float)).max() <= 1


def test_one_that_cannot_be_made_is_named_and_tried_again(tiny_bundle, tmp_path, monkeypatch):
    prompts, out, small = write(tmp_path, LINES), tmp_path / "out", ("--height", 64, "--width", 64, "--steps", 4)
    save = making.save_frames

    def too_large(frames, path, frames_per_second):
        if path.suffix == ".bmp":
            raise UsageError(".bmp cannot hold the picture")
        save(frames, path, frames_per_second)

    monkeypatch.setattr(making, "save_frames", too_large)
    result, report = generate(tiny_bundle, prompts, out, *small)
    assert result.exit_code == 1
    assert "line 3: .bmp cannot hold the picture" in result.stderr
    assert result.stderr.splitlines()[-1] == "error: 1 of 4 were not made; line 3: .bmp cannot hold the picture"
    assert report == {"out": str(out), "made": 3, "kept": 0, "failed": 1}
    assert [one["id"] for one in records(out) if "error" in one] == ["00003"]
    monkeypatch.undo()
    result, report = generate(tiny_bundle, prompts, out, *small)
    assert result.exit_code == 0
    assert (report["made"], report["kept"]) == (1, 3)
    assert not [one for one in records(out) if "error" in one]


def test_clips(wan_bundle, tmp_path):
    lines = [
        {"prompt": "a red circle", "seed": 3, "negative_prompt": "a star"},
        {"prompt": "a blue square", "frames": 5, "file": "square.webp"},
    ]
    prompts, out = write(tmp_path, lines), tmp_path / "out"
    options = ("--height", 64, "--width", 64, "--frames", 9, "--steps", 3, "--fps", 8)
    result, _ = generate(wan_bundle, prompts, out, *options)
    assert result.exit_code == 0, result.stderr
    assert [(one["file"], one["frames"]) for one in records(out)] == [("00001.mp4", 9), ("square.webp", 5)]
    with Image.open(out / "square.webp") as clip:
        assert clip.n_frames == 5
    import av

    with av.open(str(out / "00001.mp4")) as clip:
        assert sum(1 for _ in clip.decode(video=0)) == 9
        assert clip.streams.video[0].average_rate == 8


def test_a_time_budget_is_a_picture_s_own(tiny_bundle, tmp_path):
    """It is made by itself, after the others, and its clock starts then."""
    lines = [{"prompt": "a red circle", "budget": 30.0}, *LINES]
    prompts = write(tmp_path, lines)
    pipeline = Pipeline.open(tiny_bundle, backend="cpu")
    small = {"height": 64, "width": 64, "steps": 4}
    room = EngineRoom(pipeline)
    wanted = read_lines(prompts, small, pipeline.bundle.manifest, ".png")
    made = [(one.id, outcome) for one, outcome in make(room, wanted)]
    assert made[-1][0] == "00001"
    assert made[-1][1].trace.schedule["text"].startswith("native")


@pytest.fixture
def fake(tiny_bundle, tmp_path):
    from ddit.runtime.bundle import Bundle

    pipeline, backend, clock = fake_pipeline(Bundle.open(tiny_bundle))
    lines = [{"prompt": "a red circle", "seed": seed, "steps": 4 + seed % 3} for seed in range(40)]
    wanted = read_lines(write(tmp_path, lines), {"schedule": "native"}, pipeline.bundle.manifest, ".png")
    return EngineRoom(pipeline, in_flight=8, waiting=8, clock=lambda: clock.now), backend, wanted


def test_the_batch_is_full_until_the_end(fake):
    room, backend, wanted = fake
    assert all(isinstance(outcome, Result) for _, outcome in make(room, wanted))
    steps = {rows: count for (graph, rows), count in backend.calls.items() if graph == "level-2"}
    largest = max(steps)
    assert largest > 1
    assert sum(rows * count for rows, count in steps.items()) == sum(4 + seed % 3 for seed in range(40))
    assert steps[largest] * largest >= 0.8 * sum(rows * count for rows, count in steps.items())


def test_what_fails_by_itself_costs_nobody_else(fake):
    room, backend, wanted = fake

    def spoil(graph, inputs, outputs):
        if graph == "vae_decoder" and not hasattr(backend, "spoiled"):
            backend.spoiled = True
            outputs["image"][:] = np.nan

    backend.spoil = spoil
    outcomes = [outcome for _, outcome in make(room, wanted)]
    failed = [one for one in outcomes if isinstance(one, NotFiniteError)]
    assert 1 <= len(failed) <= 8
    assert len(outcomes) == 40


def test_an_engine_that_fails_ends_it(fake):
    room, backend, wanted = fake

    def spoil(graph, inputs, outputs):
        if graph == "level-2":
            raise BackendError("the GPU is gone")

    backend.spoil = spoil
    with pytest.raises(BackendError, match="the GPU is gone"):
        list(make(room, wanted))
