"""scripts/benchmark.py, with the CPU on both sides."""

import re

import benchmark

from conftest import run


def test_a_report_has_every_graph_size_and_level(tiny_bundle, tmp_path):
    out = tmp_path / "report.md"
    options = ("--backend", "CPUExecutionProvider", "--size", "128x128", "--size", "64x128")
    result = run(benchmark.main, tiny_bundle, *options, "--steps", 4, "--repeat", 4, "--out", out)
    assert result.exit_code == 0, result.stderr
    report = out.read_text()
    assert report == result.stdout.rstrip("\n") + "\n"
    for graph in ("clip", "t5", "level-2", "level-4", "level-8", "step", "vae_decoder"):
        assert f"| {graph} | 0.0e+00 | 0.0e+00 |" in report
    assert len(re.findall(r"4 at 2 \| 4 of 4 \| inf dB", report)) == 2
    assert len(re.findall(r"\| level \d \| \d+\.\d{3} \|", report)) == 3
    assert len(re.findall(r"\| 2, [48] in turn \| \d+\.\d{3} \| – \| [+-]\d", report)) == 2


def test_a_size_that_cannot_be_read_is_named(tiny_bundle):
    result = run(benchmark.main, tiny_bundle, "--backend", "cpu", "--size", "256")
    assert result.exit_code == 2
    assert result.stderr == "error: cannot read the size '256'; write HEIGHTxWIDTH, as in 256x256\n"
