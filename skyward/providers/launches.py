"""Launches of pools that are under way in this process: their number, their undoing, and the gate that ends them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeVar

from skyward.errors import PoolError, ProviderError

logger = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")


class Gate:
    """Lets requests to clouds through until their pool ends. For any thread.

    A ``with`` block is for requests that belong together, such as a launch: the end of the pool waits for it. A block
    can't be entered any more when the gate is closed; what runs in one asks again with `check`.

    Raises
    ------
    PoolError
        The pool has ended.
    """

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._left = threading.Condition()
        self._inside = 0

    def __enter__(self) -> Self:
        with self._left:
            self.check()
            self._inside += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._left:
            self._inside -= 1
            self._left.notify_all()

    def check(self) -> None:
        """Return if the pool has not ended."""
        if self._closed.is_set():
            raise self._error or PoolError("the pool has ended: no more machines are launched for it")

    def pause(self, seconds: float) -> None:
        """Sleep, at most until the pool ends."""
        self._closed.wait(seconds)
        self.check()

    def close(self, error: BaseException | None = None) -> None:
        """Let nothing through any more: `check` raises `error`, or a PoolError. May be called twice."""
        with self._left:
            self._error = self._error or error
            self._closed.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until all blocks have been left, and tell whether they have."""
        with self._left:
            return self._left.wait_for(lambda: not self._inside, timeout_s)


@dataclass(slots=True)
class Launches:
    """The launches of one pool that share a firewall, a key or a role.

    These are made under `lock`. After a failure they are removed under it, by the last launch of a pool without
    machines.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    count: int = 0
    has_machines: bool = False
    """Whether one of them has succeeded. Its machines may not be listed yet: what they share is left to the pool's end.
    """


_launches: dict[Hashable, Launches] = {}
_counting = threading.Lock()


@contextmanager
def under_way(*shared: Hashable) -> Iterator[Launches]:
    """Count a launch for the time of a block, and return all launches with the same `shared`, such as the pool's id."""
    with _counting:
        launches = _launches.setdefault(shared, Launches())
        launches.count += 1
    try:
        yield launches
    finally:
        with _counting:
            launches.count -= 1
            if not launches.count and not launches.has_machines:
                del _launches[shared]


@contextmanager
def undone_by(undo: Callable[[], None]) -> Iterator[None]:
    """Call `undo` when the launch in the block fails. What it leaves is logged, noted, and left to the pool's end."""
    try:
        yield
    except BaseException as exc:
        try:
            undo()
        except ProviderError as left:
            logger.error("after a failed launch: %s", left)
            exc.add_note(f"left for the end of the pool: {left}")
        raise


def side_by_side(do: Callable[[T], U], items: Sequence[T], *, at_once: int) -> list[U]:
    """Return what `do` returns for each item. After a failure no further one is begun, and all are waited for."""
    over = threading.Event()

    def begin(item: T) -> U:
        if over.is_set():
            raise CancelledError
        try:
            return do(item)
        except BaseException:
            over.set()
            raise

    with ThreadPoolExecutor(at_once, thread_name_prefix="skyward-launch") as threads:
        calls = [threads.submit(begin, item) for item in items]
        try:
            wait(calls)
        finally:
            over.set()  # after Ctrl-C
    return [call.result() for call in calls]
