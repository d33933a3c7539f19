"""What a process prints and logs, as whole lines. Imports nothing of skyward."""

from __future__ import annotations

import io
import logging
import sys
import threading
import warnings
from collections.abc import Callable


def take_over(add: Callable[[str], None]) -> None:
    """Give `add` each line that this process prints, logs or warns of, from now on."""
    # Every warning: it goes to the caller, whose own filters then decide what is shown.
    warnings.simplefilter("always")
    sys.stdout = Lines(add)
    sys.stderr = Lines(add)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)


class Lines(io.TextIOBase):
    """Hands over whole lines, without their ends. Half a line waits for its end, per thread."""

    encoding = "utf-8"

    def __init__(self, add: Callable[[str], None]) -> None:
        self._add = add
        self._rest = threading.local()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        # Per thread, so that threads do not cut each other's lines.
        *lines, rest = (getattr(self._rest, "text", "") + text).split("\n")
        self._rest.text = rest
        for line in lines:
            self._add(line)
        return len(text)

    def flush(self) -> None:
        rest = getattr(self._rest, "text", "")
        if rest:
            self._rest.text = ""
            self._add(rest)
