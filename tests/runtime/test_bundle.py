"""Bundles that are damaged, incomplete, from the future or hostile end in one clear line."""

import hashlib
import json
import os
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import run
from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.manifest import TensorSpec
from ddit.runtime.cli import main
from ddit.runtime.errors import BundleError, UsageError
from ddit.runtime.shapes import Size, resolve


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
    sizes = manifest.sizes(Size(units[0] * 64, units[1] * 64), text=text)
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
        manifest.sizes(Size(height, 64), text=16)
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


def swap_levels(manifest) -> None:
    manifest["levels"].append(manifest["levels"][0])


def last(manifest, graph, side="inputs"):
    return manifest["graphs"][graph][side][-1]


def add_path(manifest, **fields) -> None:
    path = {"steps": 12, "height": 64, "width": 64, "computed": [0, 1, 2], "error": 0.1, "prompts": 2}
    manifest.setdefault("paths", []).append({**path, **fields})


def add_a_state_of_the_gate_s_name(manifest) -> None:
    step = manifest["graphs"]["step"]
    for side, name in (("inputs", "gate_input"), ("outputs", "next_gate_input")):
        step[side].append({"name": name, "dtype": "float32", "shape": ["B", "H", "W"]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["graphs"].pop("level-4"), "there is no graph 'level-4'"),
        (lambda m: m["graphs"].pop("step"), "there is no graph 'step'"),
        (lambda m: m["files"].pop("level-4.onnx"), "'level-4.onnx' has no entry in files"),
        (lambda m: m["files"].pop("clip.tokenizer.json"), "'clip.tokenizer.json' has no entry in files"),
        (lambda m: m["files"].pop("t5.safetensors"), "'t5.safetensors' has no entry in files"),
        (lambda m: m.update(native=16), "native level 16 is not among the levels"),
        (lambda m: m["files"].pop("level-4.cuda.onnx"), "'level-4.cuda.onnx' has no entry in files"),
        (lambda m: m["graphs"]["level-4"]["twins"].update(cuda="level-4.onnx"), "file level-4.onnx stands twice"),
        (lambda m: m["graphs"]["level-4"]["twins"].update(cuda="../level-4.onnx"), "leaves the bundle"),
        (swap_levels, "level 2 stands twice"),
        (lambda m: m["sampler"].update(base_image_seq_len=4096), "are the same"),
        (lambda m: m["sampler"].update(steps=10**12), "sampler.flow_match_euler.steps"),
        (lambda m: m["sampler"].update(max_shift=1e5), "no noise levels between 0 and 1"),
        (lambda m: m["latent"].update(channels=10**12), "latent.channels"),
        (lambda m: m["profile"]["entry"][0].update(batch=[1, 1, 10**12]), "maximum"),
        (lambda m: m["positions"]["axes"].pop(), "rope_cos is float32 (H/2, W/2, 16), it has to be"),
        (lambda m: m["guidance"].update(default=float("nan")), "NaN is no number"),
        (lambda m: m["schedule"].update(tau=float("inf")), "Infinity is no number"),
        (lambda m: m.update(format_version=True), "format_version"),
        (lambda m: m["encoders"][0]["feeds"].update(pooled="nothing"), "no level takes the input 'nothing'"),
        (lambda m: m["encoders"].pop(), "nobody knows the tensor 'context'"),
        (lambda m: last(m, "level-2").update(shape=["B/0"]), "is not between 1 and"),
        (lambda m: last(m, "level-2").update(shape=["B+1"]), "cannot be read"),
        (lambda m: last(m, "step", "outputs").update(name="deviation_x"), "'deviation_8'"),
        (lambda m: last(m, "vae_decoder", "outputs").update(name="picture"), "no tensor 'image'"),
        (lambda m: m.update(family="flux\nerror: forged"), "family: Value error, the text has a line break"),
        (lambda m: m["made_with"].update({"\x1b[2J": "1"}), "cannot be shown"),
        (lambda m: m.update(opset="23"), "opset"),
        (lambda m: m["gate"].update(graph="level-2"), "graph level-2 stands twice"),
        (lambda m: m["gate"].update(graph="none"), "there is no graph 'none'"),
        (lambda m: m["gate"].update(coefficients=[]), "gate.coefficients"),
        (lambda m: m["gate"].update(coefficients=[float("inf")]), "Infinity is no number"),
        (lambda m: m["graphs"]["gate"]["inputs"].pop(3), "gate_input has to have the shape (B, H/2, W/2, width)"),
        (lambda m: m["graphs"]["gate"]["inputs"].pop(1), "gate has no tensor 'timestep'"),
        (lambda m: m["graphs"]["gate"]["inputs"][2].update(name="rope_cos"), "nobody knows the tensor 'rope_cos'"),
        (lambda m: m["graphs"]["gate"]["outputs"][0].update(shape=["B", "H/2", "W/2", 7]), "it has to be float32"),
        (lambda m: last(m, "gate", "outputs").update(name="velocity"), "gate has no tensor 'gate_change_high'"),
        (lambda m: add_path(m, computed=[0, 2, 1]), "have to rise from 0"),
        (lambda m: add_path(m, computed=[1, 2]), "have to rise from 0"),
        (lambda m: add_path(m, computed=[0, 12]), "stay below their number"),
        (lambda m: (add_path(m), add_path(m)), "the path for 12 steps at 64×64 stands twice"),
        (add_a_state_of_the_gate_s_name, "step: gate_input is a tensor of gate only"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(copy, change, words):
    edit(copy, change)
    result = run(main, "inspect", copy)
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.strip().isprintable()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"family": "a", "family": "b"}', "'family' stands twice"),
        ("[]", "not valid"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_manifests_that_are_none(copy, content, words):
    (copy / "bundle.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = run(main, "inspect", copy)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert words in result.stderr


def test_a_manifest_is_read_from_a_regular_file_of_a_sane_size(copy):
    path = copy / "bundle.json"
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in run(main, "inspect", copy).stderr
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "not a regular file" in run(main, "inspect", copy).stderr
    path.unlink()
    with path.open("wb") as file:
        file.truncate(65_000_000)
    assert "larger than 64 MB" in run(main, "inspect", copy).stderr


def replace_file(bundle, name, content: bytes) -> None:
    """Another file, whose hash and size fit."""
    (bundle / name).write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    edit(bundle, lambda manifest: manifest["files"].update({name: entry}))


@pytest.mark.parametrize("what", ["renamed", "misshapen"])
def test_graphs_that_are_not_what_the_manifest_says(copy, tmp_path, what):
    from onnx import TensorProto, helper

    name = "picture" if what == "renamed" else "image"
    nodes = [
        helper.make_node("ReduceMean", ["latent"], ["mean"], keepdims=0),
        helper.make_node("Reshape", ["mean", "one"], [name]),
    ]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("latent", TensorProto.FLOAT, ["B", 4, "H", "W"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1])],
        [helper.make_tensor("one", TensorProto.INT64, [2], [1, 1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    replace_file(copy, "vae_decoder.onnx", model.SerializeToString())
    options = ("--steps", 1, "--height", 64, "--width", 64, "--out", tmp_path / "out.png")
    result = run(main, "generate", copy, "a star", *options)
    assert result.exit_code == 1
    assert "the manifest says" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_tokenizer_that_panics_is_a_damaged_one(copy, tmp_path):
    tokenizer = json.loads((copy / "t5.tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$("}, "content": ""}
    replace_file(copy, "t5.tokenizer.json", json.dumps(tokenizer).encode())
    result = run(main, "generate", copy, "a star", "--steps", 1, "--height", 64, "--out", tmp_path / "out.png")
    assert result.exit_code == 1
    assert "is not a usable tokenizer" in result.stderr


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("transformer.safetensors", "level-2 gave NaN or infinity at step 1 of 2"),
        ("t5.safetensors", "t5 gave NaN or infinity for the prompt"),
        ("vae_decoder.safetensors", "vae_decoder gave NaN or infinity at the end"),
    ],
)
def test_weights_that_are_no_numbers_make_no_picture(copy, tmp_path, file, words):
    content = bytearray((copy / file).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = b"\xff" * (len(content) - start)  # NaN in every type
    (copy / file).write_bytes(content)
    out = tmp_path / "out.png"
    result = run(main, "generate", copy, "a star", "--steps", 2, "--height", 64, "--width", 64, "--out", out)
    assert result.exit_code == 1
    assert words in result.stderr
    assert not out.exists()
