"""Calls that belong together, and the future of a single one."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from skyward.engine.calls import Item, Packer
from skyward.engine.future import ItemOutcomes
from skyward.transfer.wire import Access, Kind, Outcome

if TYPE_CHECKING:
    from skyward.engine.callbacks import Callbacks
    from skyward.engine.engine import Engine


_VALUE, _CANCELLED = Kind.VALUE, Kind.CANCELLED  # looked up once: this is done for every call


class Group:
    """Calls that are limited and cancelled together. Made by `Engine.group`.

    `deliver` takes their outcomes; None: they are the results of futures, set in a thread of the group's own.
    `unchanged` says that the caller's code does not run between two calls: see `Packer`. `access` is how calls see
    their large buffers; None: read-only.
    """

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[ItemOutcomes], None] | None,
        limit: int | None = None,
        *,
        unchanged: bool = False,
        access: Access | None = None,
    ) -> None:
        self.engine = engine
        self.limit = limit
        self.access = access
        self.packer = Packer(engine.store, engine.sources, unchanged=unchanged, access=access)
        self.pending: OrderedDict[Item, None] = OrderedDict()  # so that any of them can be dropped at once
        self._bytes_put = 0
        self._bytes_taken = 0  # two counters, each written by one thread only
        self.is_cancelled = False
        self.expected: int | None = None  # calls still to come beyond the pending ones, where known
        self.size: int | None = None  # all its tasks, where that is known from the start
        self.may_grow: Callable[[], bool] = _never  # by more calls, nobody knows how many
        self.done = 0  # tasks that have ended, and those of them that failed
        self.failed = 0
        self.in_flight: dict[str, list[Item]] = {}
        self._callbacks: Callbacks | None = None
        if deliver is None:
            from skyward.engine.callbacks import Callbacks

            self._callbacks = Callbacks(engine.decoder)
            deliver = self._callbacks.put
        self._deliver = deliver

    @property
    def pending_bytes(self) -> int:
        return self._bytes_put - self._bytes_taken

    def demand(self) -> int:
        """Return how many slots its calls, waiting and running, could use."""
        calls = len(self.pending) + sum(len(items) for items in self.in_flight.values())
        return calls if self.limit is None else min(calls, self.limit)

    def left(self) -> int | None:
        """Return how many tasks have not ended; None while that is not known. In the loop."""
        if self.size is not None:
            return self.size - self.done
        if self.may_grow():
            return None
        items = [*self.pending, *itertools.chain.from_iterable(self.in_flight.values())]
        return sum(item.call.tasks for item in items)

    def put(self, item: Item) -> None:
        """Queue a packed call. From any thread."""
        self.engine._check_open()
        self.pending[item] = None
        self._bytes_put += item.size
        self.engine._wake(self)

    def take(self) -> Item:
        """Take the first of the pending calls. In the loop, as what follows."""
        item, _ = self.pending.popitem(last=False)
        self._bytes_taken += item.size
        return item

    def put_back(self, item: Item) -> None:
        """Make a call the first of the pending ones again."""
        self.pending[item] = None
        self.pending.move_to_end(item, last=False)
        self._bytes_taken -= item.size

    def first(self) -> Item:
        """Return the first of the pending calls."""
        item = self.take()  # not by iteration, which fails when another thread puts a call meanwhile
        self.put_back(item)
        return item

    def drop(self, item: Item) -> bool:
        """Remove a call if it is pending, and tell whether it was."""
        if item not in self.pending:
            return False
        del self.pending[item]
        self._bytes_taken += item.size
        return True

    def cancel(self) -> None:
        """Drop what has not begun and interrupt what runs; futures of this group become cancelled.

        A running call gets an exception that user code does not catch; one that does not react within
        `skyward.worker.interrupts.GRACE_S` seconds loses its worker process, which is started afresh. What is put
        into the group afterwards is dropped too. From any thread; does not wait.
        """
        self.is_cancelled = True
        self.size, self.may_grow = None, _never
        self.engine._call_soon(self.engine._cancel_group, self)

    def close(self) -> None:
        """End the thread of its callbacks, after those that are due. Nothing is put into the group any more."""
        self.may_grow = _never
        self.packer.close()
        self.engine._call_soon(self.engine.progress.note, self)
        if self._callbacks is not None:
            self._callbacks.close(wait=False)

    def deliver(self, delivery: ItemOutcomes) -> None:
        done = failed = 0
        for item, outcome in delivery:
            self.engine.store.release(item.refs)
            kind = outcome.kind if type(outcome) is Outcome else None
            if kind is _VALUE:
                done += item.call.tasks
            elif kind is not _CANCELLED:
                done += item.call.tasks
                failed += 1
        self.done += done
        self.failed += failed
        self.engine.progress.note(self, ended=done, failed=failed)
        self._deliver(delivery)


def _never() -> bool:
    return False
