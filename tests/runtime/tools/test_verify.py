"""ddit-run verify says yes only to what it has checked."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from conftest import run
from ddit.runtime.cli import main


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "a.bundle")


def write(bundle, name: str, content: bytes) -> None:
    """Replace a file, and make its size and hash fit."""
    (bundle / name).write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    edit(bundle, lambda manifest: manifest["files"].update({name: entry}))


def edit(bundle, change) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    change(manifest)
    (bundle / "bundle.json").write_text(json.dumps(manifest))


def references(bundle, change) -> None:
    """Change the reference values."""
    arrays = load_file(bundle / "parity.safetensors")
    change(arrays)
    write(bundle, "parity.safetensors", save(arrays))


def without(part: str):
    """Drop the arrays whose names have a part."""

    def drop(arrays) -> None:
        for name in [name for name in arrays if part in name]:
            del arrays[name]

    return drop


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda b: references(b, dict.clear), "parity.safetensors lacks clip/0/input/input_ids; export it again"),
        (lambda b: references(b, without("level-8/")), "lacks level-8/0/input/context"),
        (lambda b: references(b, without("level-8/1/")), "lacks level-8/1/input/context"),
        (lambda b: references(b, without("step/1/output/next_latent")), "lacks step/1/output/next_latent"),
        (lambda b: references(b, without("t5/0/input")), "lacks t5/0/input/input_ids"),
        (
            lambda b: references(b, lambda arrays: arrays.update({"x/0/input/y": np.zeros(1)})),
            "has values of no graph, 'x/0/input/y'; export it again",
        ),
        (
            lambda b: references(b, lambda arrays: arrays.update({"step/one/input/dt": np.zeros(1)})),
            "has values of no graph, 'step/one/input/dt'",
        ),
        (lambda b: edit(b, lambda m: m["parity"].clear()), "clip was never compared with the model"),
        (
            lambda b: edit(b, lambda m: m.update(parity=[one for one in m["parity"] if one["graph"] != "level-4"])),
            "level-4 was never compared with the model",
        ),
        (lambda b: write(b, "t5.tokenizer.json", b"{}"), "t5.tokenizer.json is not a usable tokenizer"),
        *(
            (lambda b, name=name: edit(b, lambda m: m["files"].pop(name)), name)
            for name in ("level-8.onnx", "level-8.safetensors", "clip.tokenizer.json", "parity.safetensors")
        ),
    ],
)
def test_what_cannot_be_checked_does_not_pass(bundle, spoil, words):
    spoil(bundle)
    result = run(main, "verify", bundle)
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_graph_that_was_checked_otherwise_needs_no_references(bundle):
    """One that neither the exporting machine's torch nor its ONNX Runtime could run in full."""

    def change(manifest) -> None:
        for one in manifest["parity"]:
            if one["graph"] == "level-8":
                one["checked"] = "in float32 with 1 block of each kind"

    edit(bundle, change)
    references(bundle, without("level-8/"))
    result = run(main, "verify", bundle)
    assert result.exit_code == 0, result.stderr
    assert "warning: level-8 was not compared" in result.stderr


def test_files_that_the_manifest_does_not_list_are_reported(bundle):
    (bundle / "notes.txt").write_text("")
    (bundle / "engines").mkdir()
    (bundle / "engines" / ".lock").write_text("")
    result = run(main, "verify", bundle)
    assert result.exit_code == 0, result.stderr
    assert "warning: notes.txt is not a file of the bundle's" in result.stderr
    assert json.loads(run(main, "verify", bundle, "--json").stdout)["unlisted"] == ["notes.txt"]
