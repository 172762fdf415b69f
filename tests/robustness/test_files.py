"""Files of a bundle that were cut short or have other bytes, with the recorded hash and with one that fits."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostile import damaged
from outcomes import count

FILES = ("level-2.onnx", "step.onnx", "t5.onnx", "vae_decoder.onnx", "clip.tokenizer.json", "t5.tokenizer.json",
         "transformer.safetensors", "t5.safetensors", "parity.safetensors", "bundle.json")  # fmt: skip


@pytest.mark.parametrize("recorded", [True, False], ids=["as recorded", "with a hash that fits"])
def test_files(tiny_bundle, victim, examples, elsewhere, tmp_path_factory, recorded):
    folder = tmp_path_factory.mktemp("files")
    options = ("--steps", 4, "--height", 64, "--width", 64, "--schedule", "fixed:2x2,4x1,8x1")
    whole = (tiny_bundle / "bundle.json").read_text()

    @examples(*((25, 500) if recorded else (50, 1500)))
    @given(name=st.sampled_from(FILES[:-1] if not recorded else FILES), data=st.data())
    def try_one(name, data):
        content = damaged((tiny_bundle / name).read_bytes(), data)
        (victim / name).write_bytes(content)
        if not recorded:
            manifest = json.loads(whole)
            manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            (victim / "bundle.json").write_text(json.dumps(manifest))
        command = ["verify", victim] if name == "parity.safetensors" else [
            *("generate", victim, "a red star", *options, "--out", folder / "o.png", "--trace", folder / "t.json")
        ]  # fmt: skip
        outcome = elsewhere.judge(command, None if command[0] == "verify" else folder / "t.json")
        (victim / name).write_bytes((tiny_bundle / name).read_bytes())
        (victim / "bundle.json").write_text(whole)
        count("files, as recorded" if recorded else "files, hash fits", outcome)

    try:
        try_one()
    finally:
        for name in FILES:
            (victim / name).write_bytes((tiny_bundle / name).read_bytes())
