"""A pool's log file: its events and what skyward's loggers say, with time stamps. A subscriber of events."""

from __future__ import annotations

import dataclasses
import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from skyward import events
from skyward.spec.log import LogConfig
from skyward.spec.validation import parse_memory

_logger = logging.getLogger("skyward")
_files: list[LogFile] = []  # that are open
_level_before = logging.NOTSET  # of our logger, before the first file was opened
_LEVELS: dict[type[Any], int] = {
    events.Error: logging.ERROR,
    events.Metrics: logging.DEBUG,
    events.CostUpdate: logging.DEBUG,
    events.TaskProgress: logging.DEBUG,
}


class LogFile:
    """Writes into ``config.file``, put aside at its size of rotation. Close it when the pool ends.

    Raises
    ------
    OSError
        The file can't be opened for writing.
    """

    def __init__(self, config: LogConfig, pool_id: str) -> None:
        assert config.file is not None
        path = Path(config.file).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        size = parse_memory(config.rotation) * 10**6
        # One file more than those put aside: the one that is written to.
        self._handler = RotatingFileHandler(path, maxBytes=size, backupCount=config.retention, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {pool_id} %(message)s"))
        self._handler.setLevel(config.level)
        self._handler.name = f"skyward log file of {pool_id}"  # consoles tell our handlers from others by the name
        self._open()

    def __call__(self, event: Any) -> None:
        level = _LEVELS.get(type(event), logging.INFO)
        if level >= self._handler.level:
            self._handler.handle(logging.LogRecord("skyward", level, "", 0, _text(event), None, None))

    def _open(self) -> None:
        global _level_before
        if not _files:
            _level_before = _logger.level
        _files.append(self)
        _logger.setLevel(min(_logger.getEffectiveLevel(), self._handler.level))
        _logger.addHandler(self._handler)

    def close(self) -> None:
        """Stop writing. May be called twice; files of several pools may be closed in any order."""
        _logger.removeHandler(self._handler)
        if self in _files:
            _files.remove(self)
            if not _files:
                _logger.setLevel(_level_before)
        self._handler.close()


def _text(event: Any) -> str:
    if isinstance(event, events.LogLine):
        return f"[node {event.node}] {event.line}"
    facts = " ".join(f"{f.name}={getattr(event, f.name)!r}" for f in dataclasses.fields(event))
    return f"{type(event).__name__} {facts}".rstrip()
