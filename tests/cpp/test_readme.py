"""README's program builds against an installed library and makes the picture that Python makes."""

import re
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from cpp.conftest import PROMPT, SEED, tool, write_inputs
from ddit.runtime import Pipeline

ROOT = Path(__file__).parents[2]


def test_readme_s_program(release, places, rich_bundle, tmp_path):
    blocks = dict(
        re.findall(r"^```(cpp|cmake)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    )
    (tmp_path / "main.cpp").write_text(blocks["cpp"])
    head = "cmake_minimum_required(VERSION 3.21)\nproject(picture LANGUAGES CXX)\n"
    (tmp_path / "CMakeLists.txt").write_text(head + blocks["cmake"])
    tool("cmake", "--install", release, "--prefix", tmp_path / "installed")
    prefix = f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}"
    tool("cmake", "-G", "Ninja", "-S", tmp_path, "-B", tmp_path / "build", prefix, *places)
    tool("cmake", "--build", tmp_path / "build")
    (tmp_path / "demo.bundle").symlink_to(rich_bundle)
    write_inputs(rich_bundle, tmp_path, 256, 256)
    done = subprocess.run([tmp_path / "build" / "picture"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = Pipeline.open(rich_bundle, backend="cpu")(PROMPT, seed=SEED, schedule="adaptive:0.1")
    words = ["predicted" if level is None else "computed" for level in expected.trace.levels]
    assert done.stdout.split() == words
    pixels = [np.asarray(image, dtype=int) for image in (Image.open(tmp_path / "image.png"), expected.image)]
    assert abs(pixels[0] - pixels[1]).max() <= 1
    host = subprocess.run([tmp_path / "installed/bin/ddit_host", "--help"], capture_output=True, text=True, check=False)
    assert host.stdout.startswith("Usage: ddit_host BUNDLE ")


def test_the_page_s_python_writes_the_host_s_input(host, rich_bundle, tmp_path, monkeypatch):
    """The tiny model's latent has fewer channels than the demo's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.bundle").symlink_to(rich_bundle)
    (example,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "cpp.md").read_text(), re.DOTALL | re.MULTILINE)
    exec(compile(example.replace("(16, 32, 32)", "(4, 32, 32)"), "docs/cpp.md", "exec"), {})
    done = host("demo.bundle", "--ids", "ids.json", "--noise", "noise.npy", "--out", "o.png", "--steps", 2)
    assert done.returncode == 0, done.stderr
