"""The complexity map: where and when there was detail."""

import json

import numpy as np
from PIL import Image

from conftest import run
from ddit.runtime import Pipeline, request
from ddit.runtime.cli import main as ddit_run
from ddit.runtime.complexity import Complexity
from ddit.runtime.policies import Fixed


def test_where_and_when():
    complexity = Complexity(4)
    early, late = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)
    early[0, 0], late[1, 2] = 2.0, 6.0
    complexity.add(5, early)
    complexity.add(9, late)
    complexity.add(11, late)
    np.testing.assert_allclose(complexity.where().mean(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(complexity.where()[1, 2] / complexity.where()[0, 0], 6.0, rtol=1e-6)
    assert complexity.when()[0, 0] == 5
    assert complexity.when()[1, 2] == 10
    assert Complexity(4).to_dict() == {"patch": 4, "where": [], "when": []}


def test_the_map_lies_over_the_picture_and_its_numbers_in_the_trace(tiny_bundle, tmp_path):
    options = ("--steps", 6, "--height", 64, "--width", 128, "--out", tmp_path / "out.png")
    outputs = ("--map", tmp_path / "map.png", "--trace", tmp_path / "trace.json")
    result = run(ddit_run, "generate", tiny_bundle, "a red circle", "--backend", "cpu", *options, *outputs)
    assert result.exit_code == 0, result.stderr
    assert Image.open(tmp_path / "map.png").width > 1000
    complexity = json.loads((tmp_path / "trace.json").read_text())["complexity"]
    assert complexity["patch"] == 4
    assert np.shape(complexity["where"]) == np.shape(complexity["when"]) == (2, 4)
    assert abs(np.mean(complexity["where"]) - 1) < 0.01
    assert 2 <= np.min(complexity["when"]) <= np.max(complexity["when"]) <= 5


def test_what_a_switch_of_level_does_is_not_detail(tiny_bundle, monkeypatch):
    added = {}
    monkeypatch.setattr(Complexity, "add", lambda self, step, deviation: added.update({step: deviation}))
    pipeline, size = Pipeline.open(tiny_bundle, backend="cpu"), {"height": 64, "width": 128}
    pipeline("red", schedule=Fixed((2, 2, 2, 4, 4, 4, 4)), **size)
    assert list(added) == [2, 5, 6], "only steps whose third difference spans one level"

    # as if smooth pictures had two everywhere
    monkeypatch.setattr(request, "smooth_curves", lambda *arguments, **size: {4: [2.0] * 7})
    absolute = added.copy()
    pipeline("red", schedule=Fixed((2, 2, 2, 4, 4, 4, 4)), **size)
    for step, deviation in absolute.items():
        np.testing.assert_array_equal(added[step], deviation / 2)


def test_a_map_of_an_unknown_type_is_refused_before_the_work(tiny_bundle, tmp_path):
    result = run(ddit_run, "generate", tiny_bundle, "red", "--map", tmp_path / "map.xyz")
    assert result.exit_code == 2
    assert "has an unknown file type" in result.stderr
