"""What other processes keep in a bundle stays, and what cannot be kept is said."""

import os
import shutil
import threading

import pytest

from ddit.runtime import files
from ddit.runtime.bundle import Bundle
from ddit.runtime.bundle.manifest import Costs, DynamicCalibration
from ddit.runtime.errors import BundleError, DditError
from ddit.runtime.files import whole


@pytest.fixture
def path(tiny_bundle, tmp_path):
    return shutil.copytree(tiny_bundle, tmp_path / "a.bundle")


def calibration(steps: int, tau: float = 1.0) -> DynamicCalibration:
    return DynamicCalibration(
        tau=tau, rho=0.4, warmup=3, steps=steps, height=64, width=64, speedup=2.0, similarity=0.9, prompts=2,
        backend="cpu", costs=Costs(levels={2: 1.0, 4: 0.5, 8: 0.4}, predicted=0.0, encode=0.0, decode=0.0), curve=(),
    )  # fmt: skip


def kept(path) -> list[tuple[int, float]]:
    return sorted((one.steps, one.tau) for one in Bundle.open(path).manifest.calibrations)


def names(path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_two_calibrations_that_overlap_are_both_kept(path):
    first, second = Bundle.open(path), Bundle.open(path)
    first.calibrate(calibration(4))
    second.calibrate(calibration(8))
    first.calibrate(calibration(4, tau=2.0))
    assert kept(path) == [(4, 2.0), (8, 1.0)]
    assert first.manifest == Bundle.open(path).manifest


def test_many_calibrations_at_once_are_all_kept(path):
    before = names(path)
    opened = [Bundle.open(path) for _ in range(8)]
    children = []
    for steps, bundle in enumerate(opened, 1):
        if (child := os.fork()) == 0:
            try:
                bundle.calibrate(calibration(steps))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert [steps for steps, _ in kept(path)] == [*range(1, 9)]
    assert names(path) == before


def export_again(path) -> None:
    """In the place of the bundle another one, as an export leaves it."""
    manifest = Bundle.open(path).manifest
    infos = {**manifest.files, "step.onnx": manifest.files["step.onnx"].model_copy(update={"sha256": "0" * 64})}
    with whole(path / "bundle.json") as part:
        part.write_text(manifest.model_copy(update={"files": infos}).model_dump_json())


def test_a_calibration_of_another_version_is_not_kept(path):
    opened = Bundle.open(path)
    export_again(path)
    before = (path / "bundle.json").read_bytes()
    with pytest.raises(BundleError, match=r"a\.bundle was exported again while it was open; open it anew"):
        opened.calibrate(calibration(4))
    assert (path / "bundle.json").read_bytes() == before


def test_a_calibration_waits_for_who_changes_the_bundle(path):
    opened, done = Bundle.open(path), []
    waiting = threading.Thread(target=lambda: done.append(opened.calibrate(calibration(4))))
    with Bundle.open(path).lock():
        waiting.start()
        waiting.join(0.2)
        assert not done
    waiting.join(10)
    assert kept(path) == [(4, 1.0)]


def test_a_calibration_is_no_reason_for_an_open_bundle_to_stop(path):
    opened = Bundle.open(path)
    Bundle.open(path).calibrate(calibration(4))
    opened.check_current()
    export_again(path)
    with pytest.raises(BundleError, match="exported again"):
        opened.check_current()


@pytest.mark.parametrize("moment", ["open", "fsync", "replace"])
@pytest.mark.parametrize("how", ["Ctrl-C", "I/O error", "kill"])
def test_a_calibration_that_fails_leaves_the_manifest(path, monkeypatch, how, moment):
    before, listed = (path / "bundle.json").read_bytes(), names(path)
    opened = Bundle.open(path)

    def act(*_, **__) -> None:
        if how == "kill":
            os._exit(1)
        raise KeyboardInterrupt if how == "Ctrl-C" else OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if how != "kill" or (child := os.fork()) == 0:
            patch.setattr(*((files, "_sibling") if moment == "open" else (os, moment)), act)
        if how != "kill":
            with pytest.raises(KeyboardInterrupt if how == "Ctrl-C" else DditError):
                opened.calibrate(calibration(4))
            assert names(path) == listed
        elif child == 0:
            try:
                opened.calibrate(calibration(4))
            finally:
                os._exit(0)
        else:
            os.waitpid(child, 0)
    assert (path / "bundle.json").read_bytes() == before
    opened.calibrate(calibration(8))
    assert kept(path) == [(8, 1.0)]
    assert names(path) == listed, "what a killed process left is gone"
