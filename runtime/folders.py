"""Folders that appear whole, replace older ones in one step, and are locked while they change.

At every moment the path of a folder that is being replaced leads to the old folder or to the new one, where kernel and
filesystem can exchange two names. Elsewhere there is a moment without either: the old folder then has the name
``.NAME.old-…`` beside it, and the next writer puts it back if the one before was killed there.
"""

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ddit.runtime.errors import UsageError
from ddit.runtime.files import PARTIAL

try:
    import fcntl
except ImportError:  # Windows: there is no lock on a folder, and whoever writes last wins
    fcntl = None  # type: ignore[assignment]

OLD = ".old-"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux's


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a folder, which leaves no file behind and which the end of a process lets go.

    False is given where another process holds it and ``wait`` is False. It holds among processes of one machine; where
    the filesystem has no locks, everybody gets it.
    """
    if fcntl is None:
        yield True
        return
    while True:
        handle = os.open(folder, os.O_RDONLY)
        try:
            free = _take(handle, wait)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                yield free
                return
        finally:
            os.close(handle)  # and again, where the folder was replaced while this waited


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside ``path`` to write into; give it to `replace_folder` when it is complete.

    It is removed at the end of the block, or what it was exchanged for. What killed writers left is removed or put back
    first. Raises `UsageError` while another process writes the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{PARTIAL}{secrets.token_hex(4)}")
    with ExitStack() as stack:
        with locked(path.parent):  # or a writer that starts now would take this one for a killed one
            _tidy(path)
            stack.callback(shutil.rmtree, partial, ignore_errors=True)
            partial.mkdir()
            stack.enter_context(locked(partial))
        yield partial


def replace_folder(new: Path, path: Path) -> None:
    """Put a folder in the place of ``path``; the old one, if there is one, lies at ``new`` then, or is deleted.

    Whatever goes wrong, ``path`` is the old folder or the new one.
    """
    if not os.path.lexists(path):
        os.rename(new, path)
        return
    if exchange(new, path):
        return
    old = path.with_name(f".{path.name}{OLD}{secrets.token_hex(4)}")
    try:
        os.rename(path, old)
        os.rename(new, path)
    finally:
        # also after Ctrl-C, which may come between any two lines
        if not os.path.lexists(new):
            shutil.rmtree(old, ignore_errors=True)
        elif os.path.lexists(old):
            os.rename(old, path)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step. False where the system or the filesystem cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or a C library of before 2018
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def set_aside(path: Path) -> Path | None:
    """The old folder that a killed writer of ``path`` left under another name, if there is nothing at ``path``."""
    found: list[Path] = []
    with suppress(OSError):
        if not os.path.lexists(path):
            found = [one for one in path.parent.iterdir() if one.name.startswith(f".{path.name}{OLD}")]
    return max(found, key=lambda one: one.stat().st_mtime, default=None)


def flush(folder: Path) -> None:
    """Wait until everything in a folder is on the disk."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _take(handle: int, wait: bool) -> bool:
    """Lock an open folder. False where another process holds the lock."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL):
            raise
    return True


def _tidy(path: Path) -> None:
    """Put back or remove what killed writers of ``path`` left. Raises `UsageError` where one is not dead."""
    for one in list(path.parent.iterdir()):
        if one.name.startswith(f".{path.name}{PARTIAL}") and one.is_dir():
            # not found: its writer has just ended and removed it
            with suppress(FileNotFoundError), locked(one, wait=False) as dead:
                if not dead:
                    raise UsageError(f"another process is writing {path}; wait for its end, or choose another name")
                shutil.rmtree(one, ignore_errors=True)
    if kept := set_aside(path):
        os.rename(kept, path)
    for one in list(path.parent.iterdir()):
        if one.name.startswith(f".{path.name}{OLD}"):
            shutil.rmtree(one, ignore_errors=True)
