"""What workers have printed, as it arrives: in order, each line once, and no faster than the caller can bear."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from skyward.events import LogLine
from skyward.worker.capture import DROPPED

LINES_KEPT = 10_000
"""Lines kept per node."""
LINES_PER_S = 10_000
"""Lines a second that are taken of a whole pool, when it goes on for long. Chosen, not measured: more than
anyone reads, and it leaves most of the event loop's time to results."""
_AT_ONCE = 2 * LINES_PER_S
_LAST = 10
"""Lines at the end of each batch that are never dropped, so that the end of a storm is seen."""


class Output:
    """Takes batches of lines from worker processes. `receive` is for one thread, that of the event loop.

    Parameters
    ----------
    instance_id
        Gives the name of the machine that is a node.
    emit
        Hears of each line.
    """

    def __init__(self, instance_id: Callable[[int], str], emit: Callable[[Any], None]) -> None:
        self._instance_id = instance_id
        self._emit = emit
        self._kept: dict[int, deque[str]] = {}
        self._awaited: dict[str, list[tuple[int, int]]] = {}  # numbers of each worker process's lines that may come
        self._allowance = float(_AT_ONCE)
        self._counted_at = time.monotonic()

    def receive(self, message: Any) -> None:
        """Take a batch. Lines come by two ways, and are numbered: some come twice, some after later ones."""
        node, lines = message["node"], self._new(message["process"], message["first"], message["lines"])
        most = max(_LAST, self._allowed())
        if dropped := lines[:-most]:
            lines = [(dropped[-1][0], DROPPED, str(sum(map(_count, dropped)))), *lines[-most:]]
        self._allowance -= len(lines)
        kept = self._kept.setdefault(node, deque(maxlen=LINES_KEPT))
        instance_id = self._instance_id(node)
        for stamp, stream, line in lines:
            if stream == DROPPED:
                stream, line = "stderr", f"... {line} lines dropped ..."
            kept.append(line)
            self._emit(LogLine(node=node, instance_id=instance_id, line=line, timestamp=stamp, stream=stream))

    def _new(self, process: str, first: int, lines: list[Any]) -> list[Any]:
        """Return those lines of a batch that have not come yet; `first` is the number of the first of the batch."""
        end = first + len(lines)
        awaited = self._awaited.get(process, [(0, sys.maxsize)])
        rest = [part for start, stop in awaited for part in ((start, min(stop, first)), (max(start, end), stop))]
        self._awaited[process] = [(start, stop) for start, stop in rest if start < stop]
        return [line for start, stop in awaited for line in lines[max(0, start - first) : max(0, stop - first)]]

    def _allowed(self) -> int:
        now = time.monotonic()
        self._allowance = min(_AT_ONCE, self._allowance + LINES_PER_S * (now - self._counted_at))
        self._counted_at = now
        return int(self._allowance)

    def lines(self, node: int | None = None) -> list[str]:
        """Return the last lines of a node, or of all, by node. From any thread."""
        nodes = sorted(self._kept) if node is None else [node]
        return [line for n in nodes for line in list(self._kept.get(n, ()))]


def _count(entry: tuple[float, str, str]) -> int:
    _, stream, line = entry
    return int(line) if stream == DROPPED else 1
