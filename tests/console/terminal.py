"""A terminal as far as consoles need one: what it shows after all that was written to it."""

from __future__ import annotations

import os
import pty
import re
import select
import termios
from typing import TextIO

_PART = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Terminal:
    """The two ends of a pseudo-terminal. `stream` is what a program writes to."""

    def __init__(self, columns: int = 100, rows: int = 30, encoding: str = "utf-8") -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (rows, columns))
        modes = termios.tcgetattr(slave)
        modes[1] &= ~termios.OPOST  # what is written arrives as it is
        termios.tcsetattr(slave, termios.TCSANOW, modes)
        self.stream: TextIO = os.fdopen(slave, "w", encoding=encoding, buffering=1)
        self._encoding = encoding
        self._written = ""

    @property
    def written(self) -> str:
        """All that was written so far."""
        while select.select([self._master], [], [], 0.05)[0]:
            self._written += os.read(self._master, 1 << 16).decode(self._encoding)
        return self._written

    @property
    def lines(self) -> list[str]:
        """What is to be seen, with the lines that have scrolled away, without colours."""
        rows: list[str] = [""]
        row = column = 0
        for match in _PART.finditer(self.written):
            number, code, control, text = match.groups()
            if text:
                line = rows[row].ljust(column)
                rows[row] = line[:column] + text + line[column + len(text) :]
                column += len(text)
            elif control == "\r":
                column = 0
            elif control == "\n":
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            elif code == "A":
                row = max(0, row - int(number or 1))
            elif code == "J":
                rows[row] = rows[row][:column]
                del rows[row + 1 :]
            elif code == "K":
                rows[row] = rows[row][:column]
            elif code != "m":
                raise AssertionError(f"an unexpected code: {match.group()!r}")
        return [line.rstrip() for line in rows]

    def close(self) -> None:
        self.stream.close()
        os.close(self._master)
