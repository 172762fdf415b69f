"""Hostile bundles with AddressSanitizer and UndefinedBehaviorSanitizer: refused with one line, or run."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpp.conftest import write_inputs
from ddit.runtime.bundle import read_manifest
from ddit.runtime.errors import BundleError
from hostile import damaged, mutate
from outcomes import count

HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (9999999, 9999999, 9999999), }"
HUGE = b"\x93NUMPY\x01\x00" + bytes([len(HEADER), 0]) + HEADER
FILES = ("level-2.onnx", "step.onnx", "t5.onnx", "vae_decoder.onnx", "transformer.safetensors", "bundle.json")
STEPS = 5


@pytest.fixture(scope="module")
def victims(tiny_bundle, wan_bundle, tmp_path_factory) -> dict[str, Path]:
    """Copies of a bundle of pictures and of one of clips. Whoever damages one repairs it."""
    folder = tmp_path_factory.mktemp("hostile")
    bundles = {"pictures": tiny_bundle, "clips": wan_bundle}
    return {name: shutil.copytree(bundle, folder / f"{name}.bundle") for name, bundle in bundles.items()}


@pytest.fixture(scope="module")
def attempt(victims, checked_host, tmp_path_factory):
    """What becomes of a bundle in the host."""
    options = {}
    for name, frames in (("pictures", None), ("clips", 5)):
        folder = tmp_path_factory.mktemp("attempts")
        inputs = write_inputs(victims[name], folder, 64, 64, frames)
        options[name] = (*inputs, "--steps", STEPS, "--out", folder / "%d.png")

    def make(name: str) -> str:
        done = checked_host(victims[name], *options[name])
        if done.returncode == 0:
            return "ran"
        lines = done.stderr.splitlines()
        clean = done.returncode in (1, 2) and len(lines) == 1 and lines[0].startswith("error: ")
        return "refused" if clean and lines[0].isprintable() else f"bad: {done.returncode} {done.stderr!r}"

    return make


def examples(pytestconfig, few: int, many: int):
    thorough = pytestconfig.getoption("--thorough")
    return settings(
        max_examples=many if thorough else few,
        derandomize=not thorough,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("kind", ["pictures", "clips"])
def test_manifests(victims, attempt, pytestconfig, kind):
    victim = victims[kind]
    whole = (victim / "bundle.json").read_text()

    @examples(pytestconfig, 60, 2000)
    @given(data=st.data())
    def try_one(data):
        manifest = json.loads(whole)
        mutate(manifest, data)
        (victim / "bundle.json").write_text(json.dumps(manifest))
        outcome = attempt(kind)
        count("C++: manifests", outcome)
        try:
            read_manifest(victim)
        except BundleError:
            assert outcome == "refused"  # whatever Python refuses

    try:
        try_one()
    finally:
        (victim / "bundle.json").write_text(whole)


@pytest.mark.parametrize("recorded", [True, False], ids=["as recorded", "with a hash that fits"])
def test_files(victims, attempt, pytestconfig, recorded):
    victim = victims["pictures"]
    whole = {name: (victim / name).read_bytes() for name in FILES}

    @examples(pytestconfig, 20, 1000)
    @given(name=st.sampled_from(FILES if recorded else FILES[:-1]), data=st.data())
    def try_one(name, data):
        content = damaged(whole[name], data)
        (victim / name).write_bytes(content)
        if not recorded:
            manifest = json.loads(whole["bundle.json"])
            manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            (victim / "bundle.json").write_text(json.dumps(manifest))
        try:
            count("C++: files", attempt("pictures"))
        finally:
            for file in (name, "bundle.json"):
                (victim / file).write_bytes(whole[file])

    try_one()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("noise.npy", b""),
        ("noise.npy", b"\x93NUMPY\x01\x00\xff\xff{'descr': '<f4'"),
        ("noise.npy", HUGE),
        ("noise.npy", b"\x93NUMPY\x09\x00"),
        ("ids.json", b""),
        ("ids.json", b"[" * 100_000),
        ("ids.json", b'{"clip": [-1], "t5": [1]}'),
        ("ids.json", b'{"clip": [999999999], "t5": [1]}'),
        ("ids.json", b'{"clip": [1e400], "t5": []}'),
        ("ids.json", b'{"clip": 3}'),
        ("ids.json", b'{"clip": [], "t5": [], "x\\n\\u001b[2J": []}'),
    ],
)  # fmt: skip
def test_inputs(victims, checked_host, tmp_path, name, content):
    victim = victims["pictures"]
    inputs = write_inputs(victim, tmp_path, 64, 64)
    (tmp_path / name).write_bytes(content)
    done = checked_host(victim, *inputs, "--steps", 2, "--out", tmp_path / "o.png")
    assert done.returncode in (1, 2), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.rstrip("\n").isprintable()
