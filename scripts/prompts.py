"""Print the prompts that a command takes, one a line: some of the demos' scenes or clips, or a file's.

    python scripts/prompts.py scenes:1000-1040 > prompts.txt

writes those that `evaluate.py` takes to a file, for `ddit-run calibrate`.
"""

import click

from command_line.prompts import prompt_texts
from ddit.runtime.console import DditCommand


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("prompts")
def main(prompts: str) -> None:
    """Print prompts, one a line: scenes:N, scenes:START-STOP, the same of clips, or a file's."""
    for prompt in prompt_texts(prompts):
        click.echo(prompt)


if __name__ == "__main__":
    main()
