"""How the commands are told their prompts: a text file, or so many of the demo's scenes."""

from pathlib import Path

from ddit.runtime.errors import UsageError


def read_prompts(text: str) -> int | list[str]:
    """The number N of ``scenes:N``, or the lines of a file. Raises `UsageError`."""
    kind, _, count = text.partition(":")
    if kind == "scenes":
        if not count.isdecimal() or not int(count):
            raise UsageError(f"cannot read {text!r}; write scenes:N, as in scenes:100")
        return int(count)
    try:
        lines = Path(text).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{text} cannot be read; give a text file with a prompt a line, or scenes:N") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{text} holds no prompt; write one a line")
    return prompts
