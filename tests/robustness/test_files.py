"""Files of a bundle that were cut short or have other bytes, with the recorded hash and with one that fits."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outcomes import count

FILES = ("level-2.onnx", "step.onnx", "t5.onnx", "vae_decoder.onnx", "clip.tokenizer.json", "t5.tokenizer.json",
         "transformer.safetensors", "t5.safetensors", "parity.safetensors", "bundle.json")  # fmt: skip


def damaged(content: bytes, data) -> bytes:
    """The same with a few bytes changed, a piece taken out or doubled, or the end cut off."""
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        # where formats keep their structure is at the beginning, more often than not
        limit = data.draw(st.sampled_from([64, 512, len(changed)]))
        place = data.draw(st.integers(0, max(0, min(limit, len(changed)) - 1)))
        length = data.draw(st.integers(1, 40))
        how = data.draw(st.sampled_from(["flip", "flip", "byte", "fill", "drop", "double", "cut"]))
        if how == "flip":
            changed[place] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "byte":
            changed[place] = data.draw(st.sampled_from([0, 1, 0x22, 0x5B, 0x7B, 0x7F, 0x80, 0xFF]))
        elif how == "fill":
            changed[place : place + length] = b"\xff" * len(changed[place : place + length])
        elif how == "drop":
            del changed[place : place + length]
        elif how == "double":
            changed[place:place] = changed[place : place + length]
        else:
            del changed[place:]
        if not changed:
            break
    return bytes(changed)


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
