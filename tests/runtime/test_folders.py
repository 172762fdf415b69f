"""Folders are replaced in one step or not at all, whatever moment a process is interrupted, killed or refused at."""

import os
import shutil
import threading
import time
from contextlib import suppress

import pytest

from ddit.runtime import folders
from ddit.runtime.errors import UsageError
from ddit.runtime.folders import exchange, locked, new_folder, replace_folder

KILLED = 77


def write(path, text: str) -> None:
    """Replace a folder by one with a file of a text."""
    with new_folder(path) as new:
        (new / "file").write_text(text)
        replace_folder(new, path)


def text_of(path) -> str | None:
    return (path / "file").read_text() if path.exists() else None


def no_exchange(monkeypatch) -> None:
    """A filesystem that cannot exchange names, as NFS."""
    monkeypatch.setattr(folders, "exchange", lambda *_: False)


class Nth:
    """Calls of functions, of which the n-th does something else, before or after what it should do."""

    def __init__(self, n: int, act, *, after: bool):
        self.left = n
        self.act = act
        self.after = after

    def wrap(self, function):
        def call(*arguments, **options):
            self.left -= 1
            if self.left == 0 and not self.after:
                self.act()
            result = function(*arguments, **options)
            if self.left == 0 and self.after:
                self.act()
            return result

        return call


def fail_at(monkeypatch, nth: Nth, *, atomic: bool) -> None:
    """Count every call that changes a name."""
    if not atomic:
        no_exchange(monkeypatch)
    for owner, name in ((os, "rename"), (folders, "exchange"), (folders.shutil, "rmtree")):
        monkeypatch.setattr(owner, name, nth.wrap(getattr(owner, name)))


# the exchange and the clean-up, or with two renames up to five calls; each before and after
MOMENTS = [(atomic, n, after) for atomic in (True, False) for n in range(1, 6) for after in (False, True)]


@pytest.mark.parametrize(("atomic", "n", "after"), MOMENTS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(5, "Input/output error")])
def test_an_error_at_any_moment_leaves_one_whole_folder(tmp_path, monkeypatch, atomic, n, after, error):
    path = tmp_path / "a"
    write(path, "old")

    def fail() -> None:
        raise error

    with monkeypatch.context() as patch:
        fail_at(patch, Nth(n, fail, after=after), atomic=atomic)
        with suppress(KeyboardInterrupt, OSError):
            write(path, "new")
    assert text_of(path) in ("old", "new")
    write(path, "next")
    assert text_of(path) == "next"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(("atomic", "n", "after"), MOMENTS)
def test_a_process_killed_at_any_moment_leaves_a_whole_folder(tmp_path, monkeypatch, atomic, n, after):
    path = tmp_path / "a"
    write(path, "old")
    if (child := os.fork()) == 0:
        try:
            fail_at(monkeypatch, Nth(n, lambda: os._exit(KILLED), after=after), atomic=atomic)
            write(path, "new")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    if atomic:
        assert text_of(path) in ("old", "new")
    elif not path.exists():
        kept = folders.set_aside(path)
        assert kept is not None
        assert text_of(kept) == "old"
    # a writer that fails in the work tidies up too
    with pytest.raises(ZeroDivisionError), new_folder(path):
        _ = 1 / 0
    assert text_of(path) in ("old", "new")
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("n", range(1, 4))
@pytest.mark.parametrize("after", [False, True])
def test_a_first_folder_is_whole_or_not_there(tmp_path, monkeypatch, n, after):
    path = tmp_path / "a"
    if (child := os.fork()) == 0:
        try:
            fail_at(monkeypatch, Nth(n, lambda: os._exit(KILLED), after=after), atomic=True)
            write(path, "new")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert text_of(path) in (None, "new")
    with pytest.raises(ZeroDivisionError), new_folder(path):
        _ = 1 / 0
    assert os.listdir(tmp_path) == (["a"] if path.exists() else [])


def test_the_moments_are_all_of_them(tmp_path, monkeypatch):
    """No more calls than the tests above interrupt."""
    for atomic in (True, False):
        with monkeypatch.context() as patch:
            write(tmp_path / "a", "old")
            nth = Nth(0, lambda: None, after=False)
            fail_at(patch, nth, atomic=atomic)
            write(tmp_path / "a", "new")
            assert -nth.left <= 5


def test_a_rename_back_that_fails_too_is_mended_by_the_next_writer(tmp_path, monkeypatch):
    path, rename = tmp_path / "a", os.rename
    write(path, "old")

    def refuse(source, target):
        if target == path:
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        no_exchange(patch)
        patch.setattr(os, "rename", refuse)
        with pytest.raises(OSError, match="Input/output"):
            write(path, "new")
    assert not path.exists()
    with new_folder(path):
        assert text_of(path) == "old"


def test_names_are_exchanged_where_the_kernel_can(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, name)
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this filesystem cannot")
    assert (text_of(tmp_path / "a"), text_of(tmp_path / "b")) == ("b", "a")
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "c")


def test_a_reader_always_finds_the_folder(tmp_path):
    write(tmp_path / "a", "0")
    if not exchange(tmp_path / "a", tmp_path / "a"):
        pytest.skip("this filesystem cannot")
    end, missing = threading.Event(), []

    def read() -> None:
        while not end.is_set():
            if not (tmp_path / "a").exists():
                missing.append(time.time())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(200):
        write(tmp_path / "a", str(number))
    end.set()
    reader.join()
    assert not missing


def test_two_writers_of_one_folder_do_not_meet(tmp_path):
    words = r"another process is writing .*; wait for its end"
    with new_folder(tmp_path / "a"), new_folder(tmp_path / "b"):
        with pytest.raises(UsageError, match=words), new_folder(tmp_path / "a"):
            pass
        assert len(list(tmp_path.iterdir())) == 2


def test_names_with_signs_of_patterns_are_tidied_too(tmp_path):
    (tmp_path / ".x[1].partial-12").mkdir()
    (tmp_path / ".x1.partial-12").mkdir()
    write(tmp_path / "x[1]", "new")
    assert sorted(os.listdir(tmp_path)) == [".x1.partial-12", "x[1]"]


def test_a_lock_is_of_the_folder_that_is_there_when_it_is_got(tmp_path):
    """Whoever waited while the folder was replaced gets the lock of the new one."""
    write(tmp_path / "a", "old")
    got, order = threading.Event(), []

    def wait() -> None:
        with locked(tmp_path / "a"):
            order.append(text_of(tmp_path / "a"))
            with locked(tmp_path / "a", wait=False) as free:
                order.append(free)
        got.set()

    with locked(tmp_path / "a"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not got.wait(0.1)
        write(tmp_path / "a", "new")
    waiting.join(10)
    assert order == ["new", False]


def test_a_filesystem_without_locks_is_used_without(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(folders.fcntl, "flock", refuse)
    write(tmp_path / "a", "new")
    shutil.rmtree(tmp_path / "a")
