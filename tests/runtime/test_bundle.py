"""Bundles that are damaged, incomplete, from the future or hostile end in one clear line."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import run
from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.manifest import TensorSpec
from ddit.runtime.cli import main
from ddit.runtime.errors import BundleError, UsageError
from ddit.runtime.shapes import resolve


@pytest.fixture
def copy(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "copy.bundle")


def edit(bundle, change) -> None:
    """Change the manifest of a bundle."""
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def damage(bundle, how: str) -> None:
    if how == "missing file":
        (bundle / "t5.safetensors").unlink()
    elif how == "truncated file":
        content = (bundle / "transformer.safetensors").read_bytes()
        (bundle / "transformer.safetensors").write_bytes(content[:-100])
    elif how == "not json":
        (bundle / "bundle.json").write_text("{")
    elif how == "newer version":
        edit(bundle, lambda manifest: manifest.update(format_version=99))
    elif how == "leaves the bundle":
        edit(bundle, lambda manifest: manifest["graphs"]["step"].update(file="../step.onnx"))
    elif how == "absolute":
        edit(bundle, lambda manifest: manifest["files"].update({"/etc/passwd": {"sha256": "", "size": 1}}))
    elif how == "unknown field":
        edit(bundle, lambda manifest: manifest.update(surprise=1))
    elif how == "no manifest":
        (bundle / "bundle.json").unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing file", "t5.safetensors is missing; export it again"),
        ("truncated file", "damaged: transformer.safetensors has"),
        ("not json", "cannot be read"),
        ("newer version", "has format 99, this version reads format 2; update ddit"),
        ("leaves the bundle", "leaves the bundle"),
        ("absolute", "leaves the bundle"),
        ("unknown field", "not valid: surprise"),
        ("no manifest", "is not a bundle: it has no bundle.json"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_damage_is_told_in_one_line(copy, tmp_path, monkeypatch, how, words, command):
    monkeypatch.chdir(tmp_path)
    damage(copy, how)
    result = run(main, command, copy, *(["a red circle"] if command == "generate" else []))
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out.png").exists()


def test_a_flipped_bit_is_found_by_verify(copy):
    path = copy / "vae_decoder.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    result = run(main, "verify", copy)
    assert result.exit_code == 1
    assert "vae_decoder.safetensors has a wrong hash" in result.stderr


def test_wrong_weights_are_found_by_the_parity_values(copy):
    """Even where the hashes were made to fit."""
    path = copy / "level-4.safetensors"
    content = bytearray(path.read_bytes())
    content[-400:] = bytes(400)
    path.write_bytes(content)

    def fix_hash(manifest):
        import hashlib

        manifest["files"][path.name]["sha256"] = hashlib.sha256(content).hexdigest()

    edit(copy, fix_hash)
    result = run(main, "verify", copy)
    assert result.exit_code == 1
    assert "does not reproduce its parity values: level-4.velocity" in result.stderr


def test_a_graph_that_cannot_be_loaded(copy, tmp_path):
    path = copy / "level-2.onnx"
    path.write_bytes(b"\0" * path.stat().st_size)
    result = run(main, "generate", copy, "a red circle", "--height", 64, "--out", tmp_path / "out.png")
    assert result.exit_code == 1
    assert "could not load level-2.onnx" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@given(units=st.tuples(st.integers(1, 8), st.integers(1, 8)), text=st.integers(16, 512))
def test_sizes_inside_the_profile_are_taken(tiny_bundle, units, text):
    manifest = Bundle.open(tiny_bundle).manifest
    sizes = manifest.sizes(height=units[0] * 64, width=units[1] * 64, text=text)
    assert sizes == {"B": 1, "H": units[0] * 8, "W": units[1] * 8, "L": text}
    for graph in manifest.graphs.values():
        for spec in (*graph.inputs, *graph.outputs):
            assert all(dim > 0 for dim in spec.resolve(sizes))


@given(height=st.integers(-10, 600))
def test_other_sizes_are_refused_with_the_nearest(tiny_bundle, height):
    manifest = Bundle.open(tiny_bundle).manifest
    if height % 64 == 0 and 64 <= height <= 512:
        return
    with pytest.raises(UsageError) as caught:
        manifest.sizes(height=height, width=64, text=16)
    if height % 64:
        named = [int(word) for word in str(caught.value).split("nearest: ")[1].split(" or ")]
        assert all(value % 64 == 0 and value > 0 for value in named)
        assert height < 64 or any(abs(value - height) < 64 for value in named)


def test_symbolic_shapes():
    spec = TensorSpec(name="x", dtype="float32", shape=("B", 16, "H/4", "W*8"))
    assert spec.resolve({"B": 2, "H": 12, "W": 3}) == (2, 16, 3, 24)
    with pytest.raises(ValueError, match="not a multiple of 4"):
        resolve(("H/4",), {"H": 6})
    with pytest.raises(ValueError, match="not known"):
        resolve(("Z",), {"H": 6})


def test_reading_a_manifest_needs_no_files_beyond_it(tmp_path):
    with pytest.raises(BundleError, match="does not exist"):
        Bundle.open(tmp_path / "nothing")


def test_who_may_read_the_manifest_may_read_every_file(tiny_bundle, tiny_adapter):
    modes = {path.name: path.stat().st_mode for path in (*tiny_bundle.iterdir(), tiny_adapter) if path.is_file()}
    assert set(modes.values()) == {modes["bundle.json"]}
