"""Where a console writes: status on standard error, what calls print where they print it."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

_DUMB = ("dumb", "unknown")


class Streams:
    """Writes whole lines. A stream that fails, because its reader is gone, is not written to again."""

    def __init__(self) -> None:
        self._deaf: set[str] = set()

    def status(self, line: str) -> None:
        """Write a line of our own."""
        self._write("stderr", line)

    def printed(self, line: str, stream: str) -> None:
        """Write a line that a call has printed to this stream."""
        self._write(stream, line)

    def _write(self, name: str, line: str) -> None:
        stream: TextIO | None = getattr(sys, name)  # whatever stands there now: notebooks and tests replace them
        if stream is None or name in self._deaf:
            return
        try:
            # One write, so that lines of several threads do not mix.
            stream.write(f"{fitting(line, stream)}\n")
            if name == "stderr":
                stream.flush()
        except (OSError, ValueError):  # a pipe that nobody reads, a stream that is closed
            self._deaf.add(name)


def fitting(text: str, stream: Any) -> str:
    """Return `text` as far as the stream's encoding has it; what it has not is written as an escape."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except LookupError:
        return fitting(text, None)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    return text


_PLAIN = str.maketrans({"×": "x", "…": "...", "–": "-", "·": "-"})


def is_terminal(stream: Any) -> bool:
    """Tell whether a stream is a terminal on which lines can be written again."""
    try:
        return bool(stream.isatty()) and os.environ.get("TERM", "") not in _DUMB
    except (AttributeError, ValueError):  # nothing, or closed
        return False


def is_notebook() -> bool:
    """Tell whether this runs in a Jupyter kernel, or in one of its kind."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def speaks_unicode(stream: Any) -> bool:
    """Tell whether a stream can show the signs that we use."""
    try:
        "━╸⠋✓×".encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
