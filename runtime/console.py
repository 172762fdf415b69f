"""What all commands share: error lines with exit codes, messages on stderr, logging."""

import logging
import sys
from typing import Any

import click

from ddit.runtime.errors import DditError


class DditCommand(click.Command):
    """A command that ends on our errors with one line on stderr and the error's exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run; never shows a traceback for an error that ddit raised on purpose."""
        if kwargs.get("standalone_mode", True) is False:
            return super().main(*args, **kwargs)
        try:
            return super().main(*args, **kwargs)
        except DditError as error:
            logging.getLogger("ddit").debug("details", exc_info=error)
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)


class DditGroup(DditCommand, click.Group):
    """A group of commands that end so."""


def say(message: str) -> None:
    """A message for the person at the terminal: on stderr, so that results on stdout stay clean."""
    click.echo(message, err=True)


def set_up_logging(verbose: int) -> None:
    """Warnings by default; ``-v`` for information, ``-vv`` for everything that ddit logs."""
    logging.basicConfig(format="%(levelname)s: %(message)s".lower(), level=logging.WARNING)
    logging.getLogger("ddit").setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG))
