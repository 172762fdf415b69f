"""How the commands are told their prompts: a text file, or some of the demo's scenes.

    python scripts/prompts.py scenes:1000-1040 > prompts.txt

writes those that `evaluate.py` takes to a file, for `ddit-run calibrate`.
"""

import re
from pathlib import Path

import click

from ddit.runtime.console import DditCommand
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


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("prompts")
def main(prompts: str) -> None:
    """Print prompts, one a line: scenes:N, scenes:START-STOP, or a file's."""
    from scenes import balanced_scenes  # needs torch

    asked = read_prompts(prompts)
    if isinstance(asked, range):
        asked = [scene.caption for scene in balanced_scenes(asked.stop, PROMPT_SEED)[asked.start :]]
    for prompt in asked:
        click.echo(prompt)


if __name__ == "__main__":
    main()
