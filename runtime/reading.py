"""Reading files that may come from anywhere: no more than a limit, and never from a device or a pipe."""

from pathlib import Path


def read_text(path: Path, limit: int) -> str:
    """The text of a regular file of so many bytes or fewer.

    Raises `OSError` and `ValueError`, whose words say why it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it is larger than {limit / 1e6:g} MB")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
