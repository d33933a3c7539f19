"""A few lines at the bottom of a terminal that are written again and again, below whatever else is written there.

The cursor rests at the beginning of an empty line above them: what is written behind our back, by a child process or
through an older reference to the stream, begins there, and the next drawing leaves it alone. What goes through
`sys.stdout` and `sys.stderr` is let through between two drawings. While other code holds the line (a bar of tqdm,
a prompt), nothing is drawn.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from skyward.console.streams import fitting, is_terminal

_ERASE = "\x1b[J"  # from the cursor to the end of the screen
_BAR_S = 1.0
"""Seconds without drawing after other code has moved the cursor.
Chosen, not measured: bars come more often."""


class Screen:
    """The terminal behind standard error, and standard output where that is a terminal too. Thread-safe."""

    def __init__(self) -> None:
        self._streams: dict[str, Any] = {"stderr": sys.stderr}
        if is_terminal(sys.stdout):
            self._streams["stdout"] = sys.stdout
        self._lock = threading.RLock()
        self._through = {name: _Through(self, name, stream) for name, stream in self._streams.items()}
        self.is_closed: bool = False
        self._is_drawn = False
        self._is_held = False  # by a line that has begun
        self._is_bar = False  # whose writer comes back to its beginning
        self._moved_at = -_BAR_S
        self._input: Any = None

    # --- life -----------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Let what is written to the terminal pass through here."""
        for name, through in self._through.items():
            setattr(sys, name, through)
        original = builtins.input

        def ask(*prompt: object) -> str:
            # Python writes the prompt past `sys.stdout`, and the answer is the terminal's business.
            with self._lock:
                self.clear()
                self._is_held = True
            try:
                return original(*prompt)
            finally:
                self._is_held = False

        self._input = (original, ask)
        builtins.input = ask

    def close(self) -> None:
        """Leave the terminal as it was, with what was written there. May be called twice."""
        with self._lock:
            self.clear()
            self.let_go()

    def let_go(self) -> None:
        """Let nothing pass through here any more. Takes no lock."""
        self.is_closed = True
        for name, through in self._through.items():
            if getattr(sys, name) is through:  # otherwise user code has replaced the stream
                setattr(sys, name, _open_one(self._streams[name]))
        if self._input is not None and builtins.input is self._input[1]:
            builtins.input = self._input[0]
        self._input = None

    @property
    def terminal(self) -> Any:
        """The stream behind it all."""
        return self._streams["stderr"]

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        try:
            found = os.get_terminal_size(self._streams["stderr"].fileno())
        except (OSError, ValueError, AttributeError):
            return 80, 24
        return found.columns or 80, found.lines or 24

    # --- drawing --------------------------------------------------------------------------------------------

    def draw(self, lines: Sequence[str]) -> None:
        """Show these lines, none of them wider than the screen, at the bottom, unless other code holds the line."""
        with self._lock:
            if self._is_held or time.monotonic() - self._moved_at < _BAR_S or _is_raw():
                return
            if not lines:
                self.clear()
                return
            error = self._streams["stderr"]
            error.write(f"{_ERASE}\n" + "\n".join(fitting(line, error) for line in lines) + f"\x1b[{len(lines)}A\r")
            error.flush()
            self._is_drawn = True

    def clear(self) -> None:
        """Take the lines away."""
        with self._lock:
            if self._is_drawn:
                self._is_drawn = False
                with contextlib.suppress(OSError, ValueError):
                    # From the beginning of the line, where the terminal may have put "^C".
                    self._streams["stderr"].write(f"\r{_ERASE}")
                    self._streams["stderr"].flush()

    def write(self, name: str, lines: Iterable[str]) -> None:
        """Write whole lines above."""
        with self._lock:
            self._break_line()
            # Standard output may lead elsewhere, to a pipe.
            stream = self._streams.get(name) or getattr(sys, name)
            text = "".join(f"{fitting(line, stream)}\n" for line in lines)
            # A status begins its line, also where the terminal has put "^C".
            stream.write(f"\r\x1b[K{text}" if name == "stderr" else text)
            stream.flush()

    def _break_line(self) -> None:
        self.clear()
        if self._is_held:
            self._streams["stderr"].write("\r\x1b[K" if self._is_bar else "\n")
            self._streams["stderr"].flush()
            self._is_held = False

    def let_through(self, name: str, text: str) -> int:
        """Write what another part of the program writes."""
        stream = self._streams[name]
        with self._lock:
            self.clear()
            written: int = stream.write(text)
            if text:
                if "\r" in text or "\x1b[" in text:
                    self._moved_at = time.monotonic()
                self._is_bar = "\r" in text
                self._is_held = not text.endswith("\n")
                if name == "stdout" or self._is_held:
                    stream.flush()  # before anything of ours, which goes another way
            return written


class _Through:
    """Stands for a stream; all but writing is the stream's own."""

    def __init__(self, screen: Screen, name: str, stream: Any) -> None:
        self._screen = screen
        self._name = name
        self._stream = stream

    @property
    def next(self) -> Any:
        """The stream itself where the screen is closed; it was opened before others, which are closed after it."""
        return self._stream if self._screen.is_closed else None

    def write(self, text: str) -> int:
        return self._screen.let_through(self._name, text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _open_one(stream: Any) -> Any:
    while isinstance(stream, _Through) and (behind := stream.next) is not None:
        stream = behind
    return stream


def _is_raw() -> bool:
    """Tell whether a line is being edited on the terminal, which then echoes nothing or passes on each key at once."""
    try:
        import termios

        modes: int = termios.tcgetattr(sys.__stdin__.fileno())[3]  # type: ignore[union-attr]
    except (ImportError, OSError, ValueError, AttributeError):
        return False
    except Exception as exc:  # termios.error is none of the above
        if type(exc).__name__ == "error":
            return False
        raise
    return not (modes & termios.ICANON and modes & termios.ECHO)
