"""What skyward's loggers warn of, on a console: unless the program has its own handlers, which then have it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

_logger = logging.getLogger("skyward")
_NAME = "skyward"
"""Names of our own handlers begin so."""


class Shows(Protocol):
    """A console. One that shows nothing keeps warnings from the terminal."""

    shows: bool

    def warn(self, lines: list[str]) -> None: ...


class _Handler(logging.Handler):
    """Hands records to the console that was opened last of those that show something."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.name = f"{_NAME} console"
        self.consoles: list[Shows] = []

    def emit(self, record: logging.LogRecord) -> None:
        console = next((c for c in reversed(self.consoles) if c.shows), None)
        if console is None or getattr(record, "told_by_event", False) or _has_handlers():
            return
        console.warn(self.format(record).splitlines())


_handler = _Handler()


def show(console: Shows) -> Callable[[], None]:
    """Show warnings on `console` from now on; return what ends it. Without any, Python itself would print them."""
    _handler.consoles.append(console)
    if _handler not in _logger.handlers:
        _logger.addHandler(_handler)

    def end() -> None:
        if console in _handler.consoles:
            _handler.consoles.remove(console)
        if not _handler.consoles:
            _logger.removeHandler(_handler)

    return end


def _has_handlers() -> bool:
    handlers = [*_logger.handlers, *logging.getLogger().handlers]
    return any(not (handler.name or "").startswith(_NAME) for handler in handlers)
