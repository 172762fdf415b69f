"""What tracing real configurations costs."""

import multiprocessing

import pytest

from full_size import trace


def traced(folder, configuration) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        report = pool.apply(trace, (folder, configuration))
    print(report)
    # the graphs alone: weights lie once, beside them
    assert report["level-2 kB"] < 4000
    assert report["level-4 kB"] < 4000
    assert report["peak MB"] < 4000
    # a twin of thousands of nodes is a matter of seconds
    assert report["seconds of the processor for twins"] < 30
    assert report["level-2's twin kB"] < 1000
    return report


def test_tracing_flux_dev_is_quick_and_lean(tmp_path):
    report = traced(tmp_path, "flux1-dev")
    assert report["seconds of the processor"] < 300
    # the trunk's 24 GB are there once, and level 4 adds its adapter
    assert 23.7 < report["GB of weights"] - report["GB of level 4's own"] < 23.9
    assert report["GB of level 4's own"] < 0.5
    # two operations a token and weight of the blocks, and attention between all tokens: 38 single blocks, 19 double
    tokens, width = 4096 + 512, 3072
    counted = tokens * 2 * width**2 * (3 + 4 + 5) * 57 + 4 * tokens**2 * width * 57
    assert report["level-2 TFLOP at 1024×1024 with 512 text tokens"] == pytest.approx(counted / 1e12, rel=0.01)

    # a double block is 39 nodes, a single one 16; the rest stands before and after
    assert report["level-2's twin nodes"] < 19 * 39 + 38 * 16 + 110


def test_tracing_wan_1_3b_is_quick_and_lean(tmp_path, request):
    if not request.config.getoption("--thorough"):
        pytest.skip("two minutes, in which FLUX.1-dev shows nearly the same; with --thorough")
    report = traced(tmp_path, "wan2.1-t2v-1.3b")
    assert report["seconds of the processor"] < 300
    # 1.42 billion parameters, those that diffusers keeps in float32 with four bytes each
    assert 2.8 < report["GB of weights"] - report["GB of level 4's own"] < 2.95
    assert report["GB of level 4's own"] < 0.1
