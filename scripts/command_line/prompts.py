"""The prompts that a command is given: a text file's lines, or some of the demos' scenes or clips."""

import re
from dataclasses import dataclass
from pathlib import Path

from ddit.runtime.errors import UsageError

PROMPT_SEED = 1000  # scenes and clips on which no demo model and no classifier has been trained, chosen or tested
MADE = ("scenes", "clips")  # what the demos know


@dataclass(frozen=True)
class Numbers:
    """Which of the demos' scenes, or of their clips."""

    kind: str  # one of `MADE`
    asked: range


def read_prompts(text: str) -> Numbers | list[str]:
    """The numbers of ``scenes:N``, ``scenes:START-STOP`` or the same of clips, or the lines of a file.

    Scenes are a fixed sequence, so that numbers from 500 up are prompts on which nothing that looked at ``scenes:500``
    was chosen; ``START-STOP`` leaves STOP out, as a slice does. So are clips. Raises `UsageError`.
    """
    kind, _, numbers = text.partition(":")
    if kind in MADE:
        match = re.fullmatch(r"(?:(\d+)-)?(\d+)", numbers, re.ASCII)
        asked = range(int(match[1] or 0), int(match[2])) if match else range(0)
        if not asked:
            raise UsageError(f"cannot read {text!r}; write {kind}:N or {kind}:START-STOP, as in {kind}:200-700")
        return Numbers(kind, asked)
    try:
        lines = Path(text).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UsageError(
            f"{text} cannot be read; give a text file with a prompt a line, or scenes:N or clips:N"
        ) from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{text} holds no prompt; write one a line")
    return prompts


def prompt_texts(text: str) -> list[str]:
    """The prompts themselves: a file's lines, or captions of scenes or clips, which need torch. Raises `UsageError`."""
    found = read_prompts(text)
    if isinstance(found, list):
        return found
    from demo_model.scenes import balanced_scenes
    from demo_video.clips import balanced_clips

    count = found.asked.stop
    if found.kind == "clips":
        captions = [clip.caption for clip in balanced_clips(count, PROMPT_SEED)]
    else:
        captions = [scene.caption for scene in balanced_scenes(count, PROMPT_SEED)]
    return captions[found.asked.start :]
