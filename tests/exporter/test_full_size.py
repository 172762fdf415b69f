"""What tracing FLUX.1-dev's real configuration costs."""

import multiprocessing

import pytest

from full_size import trace_flux


def test_tracing_flux_dev_is_quick_and_lean(tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        report = pool.apply(trace_flux, (tmp_path,))
    print(report)
    assert report["seconds"] < 300
    assert report["peak MB"] < 4000
    # a level's own file holds the graph alone; the trunk's 24 GB are there once, and level 4 adds its adapter
    assert report["level-2 kB"] < 4000
    assert report["level-4 kB"] < 4000
    assert 23.7 < report["GB of weights"] - report["GB of level 4's own"] < 23.9
    assert report["GB of level 4's own"] < 0.5
    # two operations a token and weight of the blocks, and attention between all tokens: 38 single blocks, 19 double
    tokens, width = 4096 + 512, 3072
    counted = tokens * 2 * width**2 * (3 + 4 + 5) * 57 + 4 * tokens**2 * width * 57
    assert report["level-2 TFLOP at 1024×1024 with 512 text tokens"] == pytest.approx(counted / 1e12, rel=0.01)
