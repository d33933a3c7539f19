"""How many calls have ended, told a few times a second: only what is known anyway is counted.

Used in the event loop of the Dask client only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

PERIOD_S = 0.25
"""Least seconds between two reports. Chosen, not measured: readers need no more."""

Tell = Callable[[int, int | None, int], None]
"""Hears how many calls have ended, of how many (None: not known), and how many of them failed."""


class Work(Protocol):
    """Calls that belong together."""

    done: int
    failed: int

    def left(self) -> int | None:
        """Return how many have not ended; None while that is not known, because more may come."""


class Single:
    """One call, as work."""

    def __init__(self) -> None:
        self.done = self.failed = 0
        self.is_cancelled = False

    def left(self) -> int:
        return 0 if self.is_cancelled else 1 - self.done


class Progress:
    """Counts the calls of all work at hand, from when there is some until all of it has ended.

    Costs next to nothing while `tell` is None.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.tell: Tell | None = None
        self._loop = loop
        self._work: dict[Work, tuple[int, int]] = {}  # at hand, and what each had done and failed before
        self._done = self._failed = 0  # of work that has ended meanwhile
        self._last: tuple[int, int | None, int] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def note(self, work: Work, *, ended: int = 0, failed: int = 0) -> None:
        """Tell of this work soon: some has come, or so many calls of it have ended just now."""
        if self.tell is None:
            return
        if work not in self._work:
            self._work[work] = work.done - ended, work.failed - failed
        if self._timer is None:
            self._timer = self._loop.call_later(PERIOD_S, self.flush)

    def flush(self) -> None:
        """Tell now, if there is anything to tell."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.tell is None:
            return
        done, failed, total = self._count()
        word = (done, total, failed)
        if word != self._last and (done or total != 0):  # what was cancelled before any of it ended is not told
            self._last = word
            self.tell(*word)
        if not self._work:
            self._done = self._failed = 0
            self._last = None

    def _count(self) -> tuple[int, int, int | None]:
        done, failed = self._done, self._failed
        total: int | None = 0
        for work, (done_before, failed_before) in list(self._work.items()):
            left = work.left()
            done += work.done - done_before
            failed += work.failed - failed_before
            total = None if total is None or left is None else total + left
            if left == 0:  # it may be large, and others may go on for long
                self._done += work.done - done_before
                self._failed += work.failed - failed_before
                del self._work[work]
        return done, failed, None if total is None else done + total
