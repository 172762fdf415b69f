"""Options stated as the fields of a dataclass."""

from dataclasses import dataclass
from pathlib import Path

import click
import pytest

from command_line.options import argument, option, options
from conftest import run


@dataclass(frozen=True, kw_only=True)
class Config:
    bundle: Path = argument(type=click.Path(path_type=Path))
    text_length: int | None = option(type=click.IntRange(1), help="Tokens.")
    schedules: tuple[str, ...] = option("--schedule", multiple=True, default=("dynamic",), help="A schedule.")
    compiled: bool = option("--compile", is_flag=True, help="Use torch.compile.")


@click.command()
@options(Config)
def command(**given: object) -> None:
    click.echo(repr(Config(**given)))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), Config(bundle=Path("a"), text_length=None, schedules=("dynamic",), compiled=False)),
        (
            ("--text-length", 3, "--schedule", "x", "--schedule", "y", "--compile"),
            Config(bundle=Path("a"), text_length=3, schedules=("x", "y"), compiled=True),
        ),
    ],
)
def test_the_command_gets_what_the_fields_ask_for(arguments, expected):
    assert run(command, "a", *arguments).stdout == f"{expected!r}\n"


def test_the_help_lists_the_fields_in_their_order_with_defaults():
    text = run(command, "--help").stdout
    assert text.startswith("Usage: command [OPTIONS] BUNDLE")
    assert text.index("--text-length") < text.index("--schedule") < text.index("--compile")
    assert "[default: dynamic]" in text
    assert text.count("[default:") == 1
