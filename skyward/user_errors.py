"""What user code raises in threads that others depend on: in callbacks, event handlers, objects while unpickled."""

from __future__ import annotations

import logging
import threading


def ends_program(exc: BaseException) -> bool:
    """Tell whether what user code raised has to go on: Ctrl-C and `sys.exit`, in the main thread.

    In any other thread they would end the thread and nothing else.
    """
    return not isinstance(exc, Exception) and threading.current_thread() is threading.main_thread()


def log(logger: logging.Logger, message: str, *args: object) -> None:
    """Log the exception that is being handled. Never raises, whatever the program's log handlers do."""
    try:
        logger.exception(message, *args)
    except BaseException as exc:
        if ends_program(exc):
            raise
