"""What all commands share: error lines with exit codes, messages on stderr, tables on stdout, logging.

Prompts, paths and the names in a bundle are other people's text. Here they become printable: they move no cursor, forge
no line and stop no command whose terminal cannot write a letter.
"""

import errno
import logging
import os
import sys
from contextlib import suppress
from typing import IO, Any

import click
from rich.console import Console
from rich.text import Text

from ddit.runtime.errors import DditError
from ddit.runtime.start import INTERRUPTED

LONGEST_LINE = 2000  # characters of a message
NARROWEST, USUAL, WIDEST = 40, 80, 1000  # columns of a table


class DditCommand(click.Command):
    """A command that ends on our errors with one line on stderr and the error's exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run; never shows a traceback for an error that ddit raised on purpose."""
        if kwargs.get("standalone_mode", True) is False:
            return super().main(*args, **kwargs)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # a terminal may not know a letter
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.stdout.flush()
        except click.ClickException as error:
            if type(error).__name__ != "NoArgsIsHelpError":  # whose message is the help
                error.message = printable(error.message)  # type: ignore[misc]
            error.show()
            code = error.exit_code
        except (click.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        except DditError as error:
            logging.getLogger("ddit").debug("details", exc_info=error)
            _tell(f"error: {error}")
            code = error.exit_code
        except MemoryError as error:
            logging.getLogger("ddit").debug("details", exc_info=error)
            _tell("error: there is not enough memory; ask for a smaller size, or stop other programs")
            code = 1
        except OSError as error:
            if error.errno != errno.EPIPE:  # a reader that has seen enough is no error
                what = f"{error.filename}:" if error.filename else "stdout cannot be written:"
                _tell(f"error: {what} {error.strerror or error}")
            _leave(sys.stdout)
            code = 1
        sys.exit(code if isinstance(code, int) else 0)


class DditGroup(DditCommand, click.Group):
    """A group of commands that end so."""


def printable(text: str) -> str:
    r"""One line that any terminal shows as it is: what cannot be seen is written out.

    >>> printable("a\x1b[31m\nred")
    'a\\x1b[31m\\nred'
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def say(message: str) -> None:
    """A message for the person at the terminal: on stderr, so that results on stdout stay clean."""
    click.echo(_line(message), err=True)


def terminal(*, stderr: bool = False) -> Console:
    """Where tables and progress bars go. It reads no markup: names in brackets stay names."""
    console = Console(stderr=stderr, markup=False, emoji=False)
    if not NARROWEST <= console.width <= WIDEST:  # COLUMNS=0, for instance
        console.width = USUAL
    return console


def red(text: str) -> Text:
    """A warning in a table."""
    return Text(text, style="red")


class PrintableFormatter(logging.Formatter):
    """A log line is one line too."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """The line without a traceback, which only ``-vv`` shows."""
        return _line(super().formatMessage(record))


def set_up_logging(verbose: int) -> None:
    """Warnings by default; ``-v`` for information, ``-vv`` for everything that ddit logs."""
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:  # not those of whoever called us
            handler.setFormatter(PrintableFormatter("%(levelname)s: %(message)s".lower()))
    logging.getLogger("ddit").setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG))


def _line(message: str) -> str:
    """A message's one line, without its middle where it is very long: its end says what to do."""
    line = printable(message)
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} … {line[-half:]}"


def _tell(message: str) -> None:
    with suppress(OSError):  # where stderr cannot be written the exit code has to do
        say(message)


def _leave(stream: IO[str]) -> None:
    """Let Python's own last flush go nowhere, so that it does not fail as well."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
