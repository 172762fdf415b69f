"""Writing files whole or not at all."""

import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory

from ddit.runtime.errors import DditError, UsageError

PARTIAL = ".partial-"  # in the names of files and folders that are being written


def user_cache() -> Path:
    """The folder for what this user's runs need not make again; it need not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddit"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write into, which takes the place of ``path`` when all went well: nobody ever sees half a file.

    It has the ending of ``path``, from which some libraries tell the format. A symbolic link stays, and the file that
    it points to is replaced. A device or a pipe gets the content and stays what it is. Raises `DditError` where it
    cannot be written.
    """
    try:
        if _is_stream(path):
            with TemporaryDirectory() as folder:
                content = Path(folder) / f"content{path.suffix}"
                yield content
                # appended, because opening /dev/stdout anew would otherwise empty the file that it leads to
                with content.open("rb") as source, path.open("ab") as stream:
                    shutil.copyfileobj(source, stream)
            return
        target = Path(os.path.realpath(path))
        partial = _sibling(target)
        try:
            yield partial
            _flush(partial)
            with suppress(FileNotFoundError):
                shutil.copymode(target, partial)
            os.replace(partial, target)
        finally:
            with suppress(OSError):
                partial.unlink()
    except OSError as error:
        raise DditError(f"{path} cannot be written: {error.strerror or error}") from None


def check_outputs(paths: Sequence[Path]) -> None:
    """Raise `UsageError` for files that `whole` could not write, or for two names of one file."""
    seen: dict[str, Path] = {}
    for path in paths:
        try:
            if path.is_dir():
                raise UsageError(f"{path} is a folder; name a file")
            if _is_stream(path):
                with path.open("ab"):
                    continue
            target = os.path.realpath(path)
            with NamedTemporaryFile(dir=os.path.dirname(target), prefix=PARTIAL):
                pass
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None
        if target in seen:
            raise UsageError(f"{seen[target]} and {path} are one file; give every output a name of its own")
        seen[target] = path


def _sibling(target: Path) -> Path:
    """An unused hidden name beside a file, with its ending; writers of one file at once get different ones."""
    # a name may have 255 bytes, and a character up to four
    stem, suffix = target.stem[:40], target.suffix if len(target.suffix) <= 16 else ""
    return target.with_name(f".{stem}{PARTIAL}{secrets.token_hex(4)}{suffix}")


def _flush(path: Path) -> None:
    """Wait until a file's content is on the disk, so that a power cut after the rename does not leave an empty one."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _is_stream(path: Path) -> bool:
    """Whether a path leads to a device, a pipe or an open file of a process, as /dev/stdout does."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(mode):
        return True
    while path.is_symlink():
        folder = Path(os.path.realpath(path.parent))
        if folder.is_relative_to("/proc"):
            return True
        path = folder / os.readlink(path)
    return False


def with_ending(path: Path, ending: str) -> Path:
    """The path with another ending, to be suggested; in a folder that has no name, as ".", a name of ours."""
    return path.with_suffix(ending) if path.name else path / f"out{ending}"
