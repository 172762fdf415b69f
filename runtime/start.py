"""Where the commands start. Ctrl-C ends them at once, without a traceback, even while Python is still importing."""

import os
import signal
from importlib import import_module

INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended


def ddit_run() -> None:
    """``ddit-run``."""
    _start("ddit.runtime.cli")


def ddit_export() -> None:
    """``ddit-export``."""
    _start("ddit.exporter.cli")


def _start(module: str) -> None:
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    main = import_module(module).main
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
