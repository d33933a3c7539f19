"""What a pool shows of itself: status on standard error, what its calls print where they print it.

A subscriber of events, of which `model` keeps what is known, and a view of it: `plain` writes lines, `live` draws on a
terminal, `cell` in a notebook. Whatever goes wrong here, the pool goes on.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import Any, Protocol

from skyward import events, forks
from skyward.console import records
from skyward.console.model import Model, PoolInfo
from skyward.console.streams import Streams, is_notebook, is_terminal

__all__ = ["Console", "PoolInfo", "open_console"]

logger = logging.getLogger(__name__)

_FRAME_S = 0.2


class _View(Protocol):
    moves: bool
    """Whether it is to be refreshed a few times a second."""

    def say(self, lines: list[str]) -> None: ...

    def show(self, event: Any, now: float) -> None: ...

    def refresh(self, now: float) -> None: ...

    def close(self, now: float) -> None: ...


def open_console(display: str, info: PoolInfo, *, prefix: bool = True) -> Console:
    """Return the console of a pool. `display` is one of ``"auto"``, ``"log"``, ``"spinner"`` and ``"quiet"``.

    `prefix`: whether lines that calls print begin with their node.
    """
    return Console(info, display, prefix=prefix)


class Console:
    """Hears of events, from any thread. Close it when nothing is left of the pool.

    `shows` is whether it shows anything at all.
    """

    def __init__(self, info: PoolInfo, display: str, *, prefix: bool = True) -> None:
        self._prefix = prefix
        self.shows: bool = display != "quiet"
        self._model = Model(info)
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._view: _View | None = None
        self._screen: Any = None
        self._streams = Streams()
        self._end_warnings = records.show(self)
        forks.tell(self)
        if not self.shows:
            return
        if display == "auto" and is_notebook():
            self._go_to_cell()
        elif display != "log" and is_terminal(sys.stderr):
            self._go_live(one_line=display == "spinner")
        else:
            self._go_plain()

    def forked(self) -> None:
        """Show nothing in a child that was forked, whose own output goes where it would go without this."""
        self._lock = threading.RLock()
        self._view = None
        screen, self._screen = self._screen, None
        if screen is not None:
            screen.let_go()

    def _go_live(self, *, one_line: bool) -> None:
        from skyward.console.progress_bar import LiveView
        from skyward.console.screen import Screen

        self._screen = Screen()
        self._view = LiveView(self._model, self._screen, one_line=one_line)
        self._screen.open()
        self._start_drawing()

    def _go_to_cell(self) -> None:
        from skyward.console.cell import CellView

        try:
            self._view = CellView(self._model)
        except Exception:  # whatever a kernel's display raises: it may be another one than IPython's
            logger.debug("the notebook shows nothing", exc_info=True)
            self._go_plain()
        else:
            self._start_drawing()

    def _start_drawing(self) -> None:
        threading.Thread(target=self._draw, name="skyward-console", daemon=True).start()

    def _go_plain(self) -> None:
        from skyward.console.plain import PlainView

        self._view = PlainView(self._model, self._streams)

    @property
    def link(self) -> str:
        """URL of the dashboard; empty while there is none."""
        return self._model.link

    @link.setter
    def link(self, link: str) -> None:
        self._model.link = link

    def __call__(self, event: Any) -> None:
        with self._lock:
            if isinstance(event, events.LogLine):
                self._guarded(self._print, event)
                return
            now = time.monotonic()
            self._model.hear(event, now)
            if self._view is not None:
                self._guarded(self._view.show, event, now)

    def _print(self, event: events.LogLine) -> None:
        line = f"[node {event.node}] {event.line}" if self._prefix else event.line
        if self._screen is not None:
            self._screen.write(event.stream, [line])
        elif self._view is not None:
            self._streams.printed(line, event.stream)

    def warn(self, lines: list[str]) -> None:
        """Show what one of our loggers has to say."""
        with self._lock:
            if self._view is not None and lines:
                self._guarded(self._view.say, lines)

    def _draw(self) -> None:
        while not self._closed.wait(_FRAME_S):
            with self._lock:
                if self._view is None or not self._view.moves or self._closed.is_set():
                    return
                self._guarded(self._view.refresh, time.monotonic())

    def _guarded(self, act: Any, *args: Any) -> None:
        """Do something that may fail, and show less from then on if it does."""
        try:
            act(*args)
        except Exception:  # a terminal that has gone, or a fault of ours: neither may end a run
            logger.debug("the console failed", exc_info=True)
            if self._view is None or not self._view.moves:
                self._view = None
                return
            if self._screen is not None:
                self._leave_screen()
            self._go_plain()

    def _leave_screen(self) -> None:
        screen, self._screen = self._screen, None
        try:
            screen.close()
        except Exception:  # as above
            logger.debug("the console could not be closed", exc_info=True)

    def close(self) -> None:
        """Write what the pool came to, and leave the terminal as it was. May be called twice."""
        if self._closed.is_set():
            return
        self._closed.set()
        with self._lock:
            now = time.monotonic()
            self._model.end(now)
            if self._view is not None:
                self._guarded(self._view.close, now)
            if self._screen is not None:
                self._leave_screen()
            self._view = None
        self._end_warnings()
