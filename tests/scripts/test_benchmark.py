"""scripts/benchmark.py, with the CPU on both sides."""

import re

import benchmark
from conftest import run
from ddit.runtime.policies import Dynamic, Native
from ddit.runtime.trace import StepRecord, Trace


def test_a_report_has_every_graph_size_and_level(tiny_bundle, tmp_path):
    out = tmp_path / "report.md"
    options = ("--backend", "CPUExecutionProvider", "--size", "128x128", "--size", "64x128")
    options += ("--prompt", "a red circle", "--prompt", "a blue star")
    result = run(benchmark.main, tiny_bundle, *options, "--steps", 4, "--repeat", 4, "--out", out)
    assert result.exit_code == 0, result.stderr
    report = out.read_text()
    assert report == result.stdout.rstrip("\n") + "\n"
    for graph in ("clip", "t5", "level-2", "level-4", "level-8", "step", "vae_decoder"):
        assert f"| {graph} | 0.0e+00 | 0.0e+00 |" in report
    # the fourth level is decided from the third difference; both sides are the same here
    assert len(re.findall(r"4 at 2 \| 4 of 4 \| 0\.0%, 0\.0% \| \d+\.\d\d% \| inf dB", report)) == 4
    assert len(re.findall(r"\| level \d \| \d+\.\d{3} \|", report)) == 2 * 3
    assert len(re.findall(r"\| 2, [48] in turn \| \d+\.\d{3} \| – \| [+-]\d", report)) == 2 * 2


def test_the_cpu_may_run_another_bundle_of_the_same_model(tiny_bundle, opset17_bundle):
    options = ("--backend", "cpu", "--size", "64x64", "--steps", 4, "--repeat", 2, "--schedule", "native")
    result = run(benchmark.main, opset17_bundle, *options, "--reference", tiny_bundle)
    assert result.exit_code == 0, result.stderr
    assert "## Agreement with the CPU, fp32\n" in result.stdout
    errors = re.findall(r"\| level-\d \| (\S+) \|", result.stdout)
    assert len(errors) == 2
    assert all(0 < float(error) < 1e-5 for error in errors)


def test_a_model_that_no_cpu_can_run_is_measured_alone(tiny_bundle):
    options = ("--backend", "cpu", "--size", "64x64", "--repeat", 2, "--no-reference")
    result = run(benchmark.main, tiny_bundle, *options)
    assert result.exit_code == 0, result.stderr
    assert re.findall(r"^## .*", result.stdout, re.MULTILINE) == ["## Steps at 64×64", "## Memory"]


def test_statistics_are_compared_up_to_the_first_unlike_choice():
    expected = trace([2, 2, 2, 2, 4], [2.0, 2.0, 2.0, 0.9, 0.5])
    actual = trace([2, 2, 2, 4, 4], [2.0, 2.2, 1.0, 0.1, 0.1])
    assert benchmark.statistics_apart(expected, actual) == "10.0%, 50.0%"
    assert benchmark.statistics_apart(expected, expected) == "0.0%, 0.0%"


def test_the_closest_call_is_taken_where_the_statistic_decides():
    schedule = Dynamic(native=2, coarse=(4,), tau=1.0, rho=0.4, warmup=3, hold=1)
    run = trace([2, 2, 2, 2, 4], [2.0, 1.01, 2.0, 0.9, 0.99])  # not after the second step, nor after the last
    assert benchmark.closest_call(schedule, run) == "10.00%"
    assert benchmark.closest_call(Native(2), run) == "–"


def trace(levels: list[int], statistics: list[float]) -> Trace:
    """A run with these levels and these σ_4."""
    steps = [
        StepRecord(step, 0.5, level, 1.0, {4: value})
        for step, (level, value) in enumerate(zip(levels, statistics, strict=True))
    ]
    return Trace("a red circle", 0, 64, 64, 1.0, 0.5, "cpu", {}, steps)


def test_a_size_that_cannot_be_read_is_named(tiny_bundle):
    result = run(benchmark.main, tiny_bundle, "--backend", "cpu", "--size", "256")
    assert result.exit_code == 2
    assert result.stderr == "error: cannot read the size '256'; write HEIGHTxWIDTH, as in 256x256\n"
