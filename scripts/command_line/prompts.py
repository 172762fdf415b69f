"""The prompts that a command is given: a text file's lines, or some of the demo's scenes."""

import re
from pathlib import Path

from ddit.runtime.errors import UsageError

PROMPT_SEED = 1000  # scenes that neither the demo model nor the classifier has been trained, chosen or tested on


def read_prompts(text: str) -> range | list[str]:
    """The numbers of the scenes of ``scenes:N`` or ``scenes:START-STOP``, or the lines of a file.

    Scenes are a fixed sequence, so that numbers from 500 up are prompts on which nothing that looked at ``scenes:500``
    was chosen; ``START-STOP`` leaves STOP out, as a slice does. Raises `UsageError`.
    """
    kind, _, numbers = text.partition(":")
    if kind == "scenes":
        match = re.fullmatch(r"(?:(\d+)-)?(\d+)", numbers, re.ASCII)
        asked = range(int(match[1] or 0), int(match[2])) if match else range(0)
        if not asked:
            raise UsageError(f"cannot read {text!r}; write scenes:N or scenes:START-STOP, as in scenes:200-700")
        return asked
    try:
        lines = Path(text).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{text} cannot be read; give a text file with a prompt a line, or scenes:N") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{text} holds no prompt; write one a line")
    return prompts


def prompt_texts(text: str) -> list[str]:
    """The prompts themselves: a file's lines, or the scenes' captions, which need torch. Raises `UsageError`."""
    asked = read_prompts(text)
    if isinstance(asked, list):
        return asked
    from demo_model.scenes import balanced_scenes

    return [scene.caption for scene in balanced_scenes(asked.stop, PROMPT_SEED)[asked.start :]]
