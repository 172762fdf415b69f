"""Print the prompts that a command takes, one a line: some of the demo's scenes, or a file's.

    python scripts/prompts.py scenes:1000-1040 > prompts.txt

writes those that `evaluate.py` takes to a file, for `ddit-run calibrate`.
"""

import click

from command_line.prompts import PROMPT_SEED, read_prompts
from ddit.runtime.console import DditCommand


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("prompts")
def main(prompts: str) -> None:
    """Print prompts, one a line: scenes:N, scenes:START-STOP, or a file's."""
    from demo_model.scenes import balanced_scenes  # needs torch

    asked = read_prompts(prompts)
    if isinstance(asked, range):
        asked = [scene.caption for scene in balanced_scenes(asked.stop, PROMPT_SEED)[asked.start :]]
    for prompt in asked:
        click.echo(prompt)


if __name__ == "__main__":
    main()
