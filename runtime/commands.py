"""Where the commands start. Ctrl-C ends them at once, without a traceback, even while Python is still importing."""

import os
import signal

INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended


def ddit_run() -> None:
    """``ddit-run``."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    from ddit.runtime.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()


def ddit_export() -> None:
    """``ddit-export``."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    from ddit.exporter.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
