"""Writing files whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ddit.runtime.errors import DditError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A sibling to write into, which takes the place of ``path`` when all went well: nobody ever sees half a file.

    It has the ending of ``path``, from which some libraries tell the format. Raises `DditError` where it cannot be
    written.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise DditError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            partial.unlink()
