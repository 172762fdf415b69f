"""ddit-run from the outside: what a user types, sees and gets."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import run
from ddit.runtime.cli import main
from ddit.runtime.tools.bench import peak_memory_mb
from ddit.runtime.tools.verify import tolerance


def test_generate_writes_picture_trace_and_plot(tiny_bundle, tmp_path):
    out, trace, plot = tmp_path / "out.png", tmp_path / "trace.json", tmp_path / "plot.png"
    files = ("--out", out, "--trace", trace, "--plot", plot)
    options = ("--seed", 7, "--steps", 6, "--height", 128, "--width", 64, "--schedule", "dynamic:tau=1e9")
    result = run(main, "generate", tiny_bundle, "a red circle", *options, *files, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["steps_per_level"] == {"2": 3, "8": 3}
    assert Image.open(out).size == (64, 128)
    assert Image.open(plot).size[0] > 100
    steps = json.loads(trace.read_text())["steps"]
    assert [step["level"] for step in steps] == [2, 2, 2, 8, 8, 8]
    assert steps[2]["statistic"].keys() == {"4", "8"}
    assert not steps[1]["statistic"]


def test_generate_says_at_which_sizes_it_ran(tiny_bundle, tmp_path):
    out, trace, plot = tmp_path / "out.png", tmp_path / "trace.json", tmp_path / "plot.png"
    files = ("--out", out, "--trace", trace, "--plot", plot)
    options = ("--steps", 6, "--height", 256, "--width", 128, "--schedule", "progressive:delta=0.5")
    result = run(main, "generate", tiny_bundle, "a red circle", *options, *files)
    assert result.exit_code == 0, result.stderr
    steps = json.loads(trace.read_text())
    small = [step["scale"] for step in steps["steps"]].count(0.5)
    assert 0 < small < 6
    assert f"6 steps ({small} at level 2 at 128×64 + {6 - small} at level 2)" in result.stderr
    assert steps["summary"]["smaller_steps"] == {"128x64": small}
    assert steps["schedule"]["progressive"]["scales"] == [0.5, 1.0]
    assert Image.open(out).size == (128, 256)
    assert Image.open(plot).size[0] > 100


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["a red circle", "--schedule", "sometimes"], 2, "unknown schedule"),
        (["a red circle", "--schedule", "fixed:16x3"], 2, "asks for level 16; the bundle has 2, 4, 8"),
        (["a red circle", "--schedule", "dynamic:tau=0"], 2, "tau must be above 0"),
        (["a red circle", "--schedule", "progressive:delta=2"], 2, "delta must lie between 0 and 1, not 2"),
        (["a red circle", "--schedule", "progressive:scales=2/1"], 2, "progressive[:delta=0.05,scales=1/2,adaptive]"),
        (["a red circle", "--schedule", "progressive", "--height", "64"], 2, "no smaller size at the scale 1/2"),
        (["a red circle", "--height", "100"], 2, "nearest: 64 or 128"),
        (["a red circle", "--height", "1024"], 2, "outside the bundle's profile '256'"),
        (["  "], 2, "the prompt is empty"),
        (["a red circle", "--steps", "0"], 2, "at least 1"),
        (["a red circle", "--steps=-5"], 2, "at least 1, not -5"),
        (["a red circle", "--steps", "10000000000"], 2, "at most 10000"),
        (["a red circle", "--schedule", "fixed:2x0"], 2, "at least 1"),
        (["a red circle", "--schedule", "fixed:2x9999,4x2"], 2, "more than 10000 steps"),
        (["a red circle", "--schedule", "fixed:2x99999999999"], 2, "cannot read '2x99999999999'"),
        (["a red circle", "--schedule", "dynamic:tau=inf"], 2, "tau must be above 0, and finite"),
        (["a red circle", "--schedule", "dynamic:coarsest=0"], 2, "at least the native level"),
        (["a red circle", "--guidance", "nan"], 2, "guidance must be a number, not nan"),
        (["a red circle", "--guidance", "1e38"], 2, "guidance must lie between -1000 and 1000"),
        (["a red circle", "--carry", "nan"], 2, "carry must be a number"),
        (["a red circle", "--height", "0"], 2, "height must be at least 1"),
        (["x" * 100_001], 2, "at most 100000 are read"),
        (["a \udcff circle"], 2, "not valid UTF-8"),
        (["a red circle", "--out", "out.blp"], 2, "unknown file type; name it out.png"),
        (["a red circle", "--out", "."], 2, "unknown file type; name it out.png"),
        (["a red circle", "--plot", "plot.pgf"], 2, "unknown file type; name it plot.png"),
        (["a red circle", "--backend", "NoSuchProvider"], 2, "no provider 'NoSuchProvider'"),
        (["a red circle", "--out", "no/such/folder/out.png"], 2, "cannot be written"),
        (["a red circle", "--out", "out.unknown"], 2, "unknown file type; name it out.png"),
        (["a red circle", "--plot", "plot.txt"], 2, "unknown file type; name it plot.png"),
    ],
)
def test_bad_requests_end_in_one_line(tiny_bundle, tmp_path, monkeypatch, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    result = run(main, "generate", tiny_bundle, *arguments)
    assert result.exit_code == code
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_plot_without_matplotlib_is_refused_before_the_work(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(main, "generate", tiny_bundle, "a star", "--out", tmp_path / "o.png", "--plot", tmp_path / "p.png")
    assert result.exit_code == 2
    assert "pip install 'ddit[plot]'" in result.stderr
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_the_message_names_both_extras(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run(main, "generate", tiny_bundle, "a star", "--out", tmp_path / "o.png")
    assert result.exit_code == 1
    assert "pip install 'ddit[cpu]' or pip install 'ddit[cuda]'" in result.stderr


def test_long_prompt_is_cut_with_a_warning(tiny_bundle, tmp_path, caplog):
    prompt = " ".join(["a red circle"] * 10)
    result = run(main, "generate", tiny_bundle, prompt, "--steps", 1, "--height", 64, "--out", tmp_path / "out.png")
    assert result.exit_code == 0
    assert "longer than 16 tokens; left out: “a red circle" in caplog.text


def test_inspect_shows_levels_and_parity(tiny_bundle):
    text = run(main, "inspect", tiny_bundle).stdout
    for words in ("profile 256", "trained (adapter", "level-8", "vae_decoder", "opset 23"):
        assert words in text
    assert json.loads(run(main, "inspect", tiny_bundle, "--json").stdout)["native"] == 2


def test_float32_pictures_are_allowed_more_rounding_the_more_pixels_they_have():
    allowed = [tolerance("vae_decoder", "fp32", (1, 3, side, side)) for side in (64, 256, 512, 1024)]
    assert allowed == pytest.approx([1e-5, 1e-5, 8e-5, 6.4e-4])
    assert tolerance("level-2", "fp32", (1, 16, 512, 512)) == 1e-5
    assert tolerance("vae_decoder", "bf16", (1, 3, 1024, 1024)) == 2e-2


def test_verify_reproduces_every_reference(tiny_bundle):
    result = run(main, "verify", tiny_bundle, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["passed"]
    assert not report["without_reference"]
    assert {check["graph"] for check in report["checks"]} >= {"level-2", "level-4", "level-8", "t5", "clip", "step"}


def test_bench_reports_every_level(tiny_bundle):
    result = run(main, "bench", tiny_bundle, "--repeat", 2, "--height", 64, "--width", 128, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert [(one["level"], one["image_tokens"]) for one in report] == [(2, 32), (4, 8), (8, 2)]
    assert all(one["milliseconds"] > 0 and one["peak_memory_mb"] > 10 for one in report)


def test_peak_memory_is_not_the_parents():
    held = np.ones(50_000_000)  # 400 MB, all of it touched
    code = "from ddit.runtime.tools.bench import peak_memory_mb; print(peak_memory_mb())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert held.nbytes / 1e6 < peak_memory_mb()
    assert float(child.stdout) < held.nbytes / 1e6


def test_a_prompt_s_dollar_signs_are_no_formulas(tiny_bundle, tmp_path):
    plot = tmp_path / "plot.svg"
    result = run(main, "generate", tiny_bundle, "$\\frac$ \x07", "--steps", 3, "--height", 64, "--width", 64,
                 "--out", tmp_path / "out.png", "--plot", plot)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert plot.is_file()


def test_more_threads_than_cores_are_cut_with_a_warning(tiny_bundle, tmp_path, caplog):
    options = ("--steps", 1, "--height", 64, "--width", 64, "--out", tmp_path / "out.png")
    assert run(main, "generate", tiny_bundle, "a star", *options, "--threads", 100_000).exit_code == 0
    assert "more than this machine's" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--steps", 1, "--schedule", "dynamic"), "calibrating needs more than 3 steps, not 1"),
        (("--speedup", "nan"), "speed-up must be above 1"),
        (("--quality", 0), "'--quality'"),
        (("--prompts", "/dev/zero"), "has more than"),
    ],
)
def test_a_calibration_that_cannot_be_is_refused_before_anything_is_measured(tiny_bundle, tmp_path, options, words):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star\na circle\n")
    result = run(main, "calibrate", tiny_bundle, "--prompts", prompts, "--height", 64, "--width", 64, *options)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "measuring" not in result.stderr


def test_a_calibration_that_cannot_be_kept_is_refused_before_anything_is_measured(tiny_bundle, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star\na circle\n")

    def read_only(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ddit.runtime.files.NamedTemporaryFile", read_only)
    result = run(main, "calibrate", tiny_bundle, "--prompts", prompts)
    assert (result.exit_code, "measuring" in result.stderr) == (2, False)
    assert "bundle.json cannot be written: Permission denied" in result.stderr


def command(*arguments, **options):
    """ddit-run in a process of its own."""
    code = "from ddit.runtime.start import ddit_run; ddit_run()"
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(words, stderr=subprocess.PIPE, timeout=120, **{"stdout": subprocess.PIPE, **options})


def test_a_full_disk_behind_stdout_is_told_in_one_line(tiny_bundle):
    with open("/dev/full", "w") as full:
        done = command("inspect", tiny_bundle, stdout=full)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines() == ["error: stdout cannot be written: No space left on device"]


@pytest.mark.parametrize("setting", [{"PYTHONIOENCODING": "ascii"}, {"COLUMNS": "0"}, {"COLUMNS": "99999999999"}])
def test_tables_are_shown_on_any_terminal(tiny_bundle, setting):
    done = command("inspect", tiny_bundle, env={**os.environ, **setting})
    assert done.returncode == 0, done.stderr
    assert b"vae_decoder" in done.stdout


@pytest.mark.parametrize("name", [b"[red]a[bold]", b"\xff\xfe", b"\x1b[31m", b"a\nerror: b"])
@pytest.mark.parametrize("there", [True, False])
def test_paths_may_have_any_name(tiny_bundle, tmp_path, name, there):
    path = tmp_path / os.fsdecode(name)
    if there:
        path.symlink_to(tiny_bundle)
    result = run(main, "inspect", path)
    assert result.exit_code == (0 if there else 1)
    shown = result.stdout if there else result.stderr
    assert all(line.isprintable() for line in shown.splitlines())
    assert len(result.stderr.splitlines()) == (0 if there else 1)


def test_ctrl_c_ends_a_command_that_is_still_importing():
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'ddit.runtime.cli': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from ddit.runtime.start import ddit_run; ddit_run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, b"")
