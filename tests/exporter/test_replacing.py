"""An older bundle survives every failure of the export that replaces it, and nothing that is not ours is deleted."""

import json
import os
import shutil
from contextlib import suppress

import pytest

from ddit.exporter.replacing import replacing
from ddit.runtime import folders
from ddit.runtime.backends.artifacts import EngineInfo, EngineStore, content_hash
from ddit.runtime.bundle import Bundle
from ddit.runtime.errors import BundleError, ModelError, UsageError
from ddit.runtime.pipeline import Pipeline

SMALL = {"height": 64, "width": 64, "steps": 1}


@pytest.fixture
def old(tiny_bundle, tmp_path):
    """A bundle in a folder of its own."""
    return shutil.copytree(tiny_bundle, tmp_path / "place" / "a.bundle")


def new_version(source, folder) -> None:
    """Another bundle's files, as an export would write them."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    manifest = json.loads((folder / "bundle.json").read_text())
    content = (folder / "parity.safetensors").read_bytes()
    (folder / "parity.safetensors").unlink()
    (folder / "parity.safetensors").write_bytes(content + b" ")
    manifest["files"]["parity.safetensors"] = {"sha256": "0" * 64, "size": len(content) + 1}
    (folder / "bundle.json").write_text(json.dumps(manifest))


def export(out, source) -> None:
    with replacing(out) as folder:
        new_version(source, folder)


def version_of(bundle) -> str:
    files = Bundle.open(bundle).manifest.files
    return "new" if files["parity.safetensors"].sha256 == "0" * 64 else "old"


def put_engine(bundle, graph: str = "step") -> str:
    """An engine of a graph; returns its key."""
    opened = Bundle.open(bundle)
    info = EngineInfo(
        backend="fake", graph=graph, content=content_hash(opened, graph), profile=opened.manifest.profile, target={},
        built_for="", options={}, file="engine", size=3, sha256="", scratch=0, built="", seconds=0,
    )  # fmt: skip
    store = EngineStore(opened)
    with store.lock(info.key):
        return store.put(info, b"abc").info.key


def engines(bundle) -> list[str]:
    return [engine.info.key for engine in EngineStore(Bundle.open(bundle)).engines()]


def test_a_bundle_and_its_engines_go_into_the_new_version(old, tiny_bundle):
    key = put_engine(old)
    opened = Bundle.open(old)
    export(old, tiny_bundle)
    assert version_of(old) == "new"
    assert engines(old) == [key]
    assert os.listdir(old.parent) == ["a.bundle"]
    assert opened.manifest != Bundle.open(old).manifest


def test_engines_are_copied_where_there_are_no_hard_links(old, tiny_bundle, monkeypatch):
    def refuse(*_, **__):
        raise OSError(1, "Operation not permitted")

    key = put_engine(old)
    monkeypatch.setattr(os, "link", refuse)
    export(old, tiny_bundle)
    assert engines(old) == [key]


CHANGES = ((os, "rename"), (os, "link"), (folders, "exchange"), (shutil, "rmtree"))


def calls(monkeypatch, act, n: int, *, atomic: bool) -> None:
    """``act`` at the n-th call that changes a name or deletes a folder."""
    left = [n]

    def wrap(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                act()
            return function(*arguments, **options)

        return call

    if not atomic:
        monkeypatch.setattr(folders, "exchange", lambda *_: False)
    for owner, name in CHANGES:
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))


MOMENTS = [(atomic, n) for atomic in (True, False) for n in range(1, 8)]


@pytest.mark.parametrize(("atomic", "n"), MOMENTS)
@pytest.mark.parametrize("how", ["Ctrl-C", "I/O error", "kill"])
def test_whatever_happens_there_is_a_whole_bundle_with_its_engines(old, tiny_bundle, monkeypatch, how, atomic, n):
    key = put_engine(old)

    def act() -> None:
        if how == "kill":
            os._exit(1)
        raise KeyboardInterrupt if how == "Ctrl-C" else OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        if how == "kill" and (child := os.fork()) == 0:
            try:
                calls(patch, act, n, atomic=atomic)
                export(old, tiny_bundle)
            finally:
                os._exit(0)
        elif how == "kill":
            os.waitpid(child, 0)
        else:
            calls(patch, act, n, atomic=atomic)
            with suppress(KeyboardInterrupt, ModelError):
                export(old, tiny_bundle)
    if how != "kill":
        assert version_of(old) in ("old", "new")
        assert engines(old) == [key]
    elif not old.exists():
        with pytest.raises(BundleError, match=r"then rename .*\.a\.bundle\.old-\w+ to a\.bundle, or export it again"):
            Bundle.open(old)
    with suppress(ZeroDivisionError), replacing(old):  # an export that fails has tidied up before
        _ = 1 / 0
    assert version_of(old) in ("old", "new")
    assert engines(old) == [key]
    assert os.listdir(old.parent) == ["a.bundle"]


def test_the_moments_are_those_of_a_whole_export(old, tiny_bundle, monkeypatch):
    put_engine(old)
    count = []
    for atomic in (True, False):
        with monkeypatch.context() as patch:
            for owner, name in CHANGES:
                real = getattr(owner, name)
                if name == "exchange" and not atomic:
                    real = lambda *_: False  # noqa: E731
                patch.setattr(owner, name, lambda *a, _real=real, **o: (count.append(1), _real(*a, **o))[1])
            export(old, tiny_bundle)
        assert 4 <= len(count) <= 7
        count.clear()


def test_a_disk_that_fails_when_it_is_asked_to_keep_everything(old, tiny_bundle, monkeypatch):
    def refuse(*_):
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ModelError, match="cannot be written: Disk quota exceeded"):
        export(old, tiny_bundle)
    assert version_of(old) == "old"
    assert os.listdir(old.parent) == ["a.bundle"]


def test_a_link_stays_a_link(old, tiny_bundle, tmp_path):
    link = tmp_path / "link.bundle"
    link.symlink_to("place/a.bundle")
    export(link, tiny_bundle)
    assert link.is_symlink()
    assert version_of(old) == "new"
    (tmp_path / "dangling").symlink_to("place/b.bundle")
    export(tmp_path / "dangling", tiny_bundle)
    assert (tmp_path / "dangling").is_symlink()
    assert sorted(os.listdir(old.parent)) == ["a.bundle", "b.bundle"]


def never(*_, **__) -> None:
    raise AssertionError("the work has begun")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda old: (old / "notes.txt").write_text(""), "holds notes.txt, which the bundle's manifest does not name"),
        (lambda old: [(old / name).mkdir() for name in "ab"], "holds a and 1 more, which the bundle's manifest"),
        (lambda old: os.chdir(old), "is the folder that you are in"),
        (lambda old: os.chdir((old / "engines").mkdir() or old / "engines"), "is the folder that you are in"),
    ],
)
def test_what_would_be_lost_is_kept(old, tiny_bundle, monkeypatch, spoil, words):
    monkeypatch.chdir(old.parent)
    spoil(old)
    before = sorted(old.iterdir())
    with pytest.raises(UsageError, match=words), replacing(old):
        never()
    assert sorted(old.iterdir()) == before
    assert os.listdir(old.parent) == ["a.bundle"]


def test_what_somebody_put_there_meanwhile_is_kept(old, tiny_bundle):
    def slowly() -> None:
        with replacing(old) as folder:
            new_version(tiny_bundle, folder)
            (old / "notes.txt").write_text("words")

    with pytest.raises(UsageError, match=r"holds notes\.txt"):
        slowly()
    assert (old / "notes.txt").read_text() == "words"
    assert version_of(old) == "old"


@pytest.mark.parametrize(
    "left",
    [".bundle.partial-12345678.json", ".cuda-fp8.partial-12345678.safetensors", "level-2.cuda-fp8.onnx"],
)
def test_what_a_killed_command_left_is_no_reason_to_refuse(old, tiny_bundle, left):
    (old / left).write_text("{")
    export(old, tiny_bundle)
    assert version_of(old) == "new"
    assert not (old / left).exists()


def test_notes_on_fp8_are_kept(old, tiny_bundle):
    (old / "notes-cuda-fp8.md").write_text("mine")
    with pytest.raises(UsageError, match="holds notes-cuda-fp8"):
        export(old, tiny_bundle)


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 1}'])
def test_a_bundle_with_a_damaged_manifest_can_be_exported_again(old, tiny_bundle, content):
    (old / "bundle.json").write_text(content)
    export(old, tiny_bundle)
    assert version_of(old) == "new"
    (old / "bundle.json").write_text(content)
    (old / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=r"holds notes\.txt"):
        export(old, tiny_bundle)


@pytest.mark.parametrize("name", ["a" * 300, "loop"])
def test_names_that_cannot_be_end_in_one_line(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    with (
        pytest.raises((ModelError, UsageError), match=r"cannot be written|is not a bundle"),
        replacing(tmp_path / name),
    ):
        never()
    assert os.listdir(tmp_path) == ["loop"]


def test_a_second_export_of_the_same_bundle_is_refused(old, tiny_bundle):
    with replacing(old) as folder:
        with pytest.raises(UsageError, match="another process is writing"), replacing(old):
            never()
        new_version(tiny_bundle, folder)
    assert version_of(old) == "new"


def test_an_open_pipeline_says_that_the_bundle_was_exported_again(old, tiny_bundle, tmp_path):
    """And runs on as long as it needs no graph that it has not opened."""
    pipeline = Pipeline.open(old, backend="cpu")
    before = pipeline("a red circle", schedule="native", **SMALL)
    export(old, tiny_bundle)
    again = pipeline("a red circle", schedule="native", **SMALL)
    assert (again.latent == before.latent).all()
    with pytest.raises(BundleError, match=r"a\.bundle was exported again while it was open; open it anew"):
        pipeline("a red circle", schedule="fixed:8x1", **SMALL)
    with pytest.raises(BundleError, match="exported again"):
        Pipeline(pipeline.bundle, pipeline.backend)
    with pytest.raises(BundleError, match="exported again"):
        list(pipeline.bundle.verify_files())
    Pipeline.open(old, backend="cpu")("a red circle", schedule="fixed:8x1", **SMALL)


def test_a_file_that_is_gone_because_of_an_export_is_explained_by_it(old, tiny_bundle):
    pipeline = Pipeline.open(old, backend="cpu")
    export(old, tiny_bundle)
    (old / "level-8.onnx").unlink()
    with pytest.raises(BundleError, match="exported again"):
        pipeline("a red circle", schedule="fixed:8x1", **SMALL)


def test_a_bundle_that_is_replaced_while_it_is_opened_is_opened_anew(old, tiny_bundle, monkeypatch):
    from ddit.runtime.bundle import store

    read, left = store.read_manifest, [1]

    def read_then_export(path):
        manifest = read(path)
        if path == old and left and left.pop():
            export(old, tiny_bundle)
        return manifest

    monkeypatch.setattr(store, "read_manifest", read_then_export)
    assert Bundle.open(old).manifest.files["parity.safetensors"].sha256 == "0" * 64


def test_an_engine_of_another_version_is_not_kept(old, tiny_bundle):
    """Its builder may have read either version's graph."""
    opened = Bundle.open(old)
    store = EngineStore(opened)
    key = put_engine(old)
    info = store.get(key).info
    export(old, tiny_bundle)
    shutil.rmtree(old / "engines" / key)
    with pytest.raises(BundleError, match="exported again"), store.lock(key):
        store.put(info, b"abc")
    assert not engines(old)
    assert not list((old / "engines").glob(".*partial"))


@pytest.mark.parametrize("n", range(1, 6))
def test_a_builder_killed_at_any_moment_leaves_no_half_engine(old, monkeypatch, n):
    key = put_engine(old)
    engine = EngineStore(Bundle.open(old)).get(key)
    engine.file.write_bytes(b"damaged")
    if (child := os.fork()) == 0:
        try:
            calls(monkeypatch, lambda: os._exit(1), n, atomic=True)
            put_engine(old)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    found = EngineStore(Bundle.open(old)).get(key)
    assert found.file.read_bytes() in (b"damaged", b"abc")
    put_engine(old)
    assert EngineStore(Bundle.open(old)).get(key).whole
    assert sorted(path.name for path in (old / "engines").iterdir()) == [f".{key}.lock", key]
