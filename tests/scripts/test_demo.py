"""The demo's script makes what it says, of pictures and of clips."""

import json

import pytest
from PIL import Image

import demo
from conftest import run


@pytest.mark.parametrize(("bundle", "suffix"), [("tiny_bundle", ".png"), ("wan_bundle", ".webp")])
def test_two_prompts_under_all_schedules_side_by_side(bundle, suffix, request, tmp_path):
    result = run(demo.main, request.getfixturevalue(bundle), "--out", tmp_path, "--steps", 4)
    assert result.exit_code == 0, result.stderr

    with Image.open(tmp_path / f"demo{suffix}") as all_of_them, Image.open(tmp_path / f"busy-dynamic{suffix}") as one:
        frames = getattr(one, "n_frames", 1)
        assert getattr(all_of_them, "n_frames", 1) == frames
        assert all_of_them.size == (4 * one.width, 2 * one.height)
        assert (frames > 1) == (suffix == ".webp")
    traces = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(traces) == 8
    assert all(step["level"] == 2 for step in traces["simple-native"]["steps"])
    assert "against" in result.stdout
