"""A command's options, stated once: as the fields of a frozen dataclass.

@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int | None = option(type=click.IntRange(1), help="Denoising steps.  [default: the model's]")

@click.command()
@options(Config)
def main(**given: Any) -> None:
    train(Config(**given))                    # python train.py --steps 20
"""

from collections.abc import Callable
from dataclasses import field, fields
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])
ADD = "adds the parameter to a command"


def argument(**attributes: Any) -> Any:
    """A field that is a positional argument of the command; ``attributes`` are those of `click.argument`."""
    return field(metadata={ADD: lambda name: click.argument(name, **attributes)})


def option(*flags: str, **attributes: Any) -> Any:
    """A field that is an option of the command; ``attributes`` are those of `click.option`.

    The option is called like the field, unless ``flags`` say otherwise. The help shows a default that is given.
    """
    attributes.setdefault("show_default", "default" in attributes)

    def add(name: str) -> Callable[[Command], Command]:
        return click.option(*(flags or [f"--{name.replace('_', '-')}"]), name, **attributes)

    return field(metadata={ADD: add})


def options(config: Any) -> Callable[[Command], Command]:
    """Give a command the arguments and options that are the fields of a dataclass, in their order."""

    def decorate(command: Command) -> Command:
        for one in reversed(fields(config)):
            command = one.metadata[ADD](one.name)(command)
        return command

    return decorate
