"""Calls that are queued, limited and cancelled together."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from skyward.engine.calls import Item
from skyward.engine.estimates import Estimates
from skyward.engine.future import Callbacks, ItemOutcomes
from skyward.engine.packer import Packer
from skyward.transfer.wire import Access

_CHUNK_CALLS = 20_000
"""Most calls in one chunk. Chosen, not measured: a chunk's list stays within a few megabytes."""
_CHUNK_BYTES = 16 << 20


class Server(Protocol):
    """What sends the calls of groups to workers. From any thread; does not wait."""

    def check_open(self) -> None:
        """Raise if no more calls are taken."""

    def wake(self, group: Group) -> None:
        """Send the calls that have been put into a group."""

    def cancel(self, group: Group) -> None:
        """Cancel all calls of a group."""

    def note(self, group: Group) -> None:
        """Tell soon how many calls of a group are left: more of that is known now."""


class Group:
    """A queue of packed calls, of which at most `limit` run at once.

    `deliver` takes their outcomes, in the event loop. `access` is how calls see their large buffers; None: read-only.
    """

    def __init__(
        self,
        server: Server,
        deliver: Callable[[ItemOutcomes], None],
        *,
        limit: int | None = None,
        access: Access | None = None,
        size: int | None = None,
    ) -> None:
        self.deliver = deliver
        self.limit = limit
        self.access = access
        self.pending: OrderedDict[Item, None] = OrderedDict()  # so that any of them can be dropped at once
        self.in_flight: dict[str, list[Item]] = {}
        self.is_cancelled: bool = False
        self.expected: int | None = None  # calls still to come beyond the pending ones, where known
        self.size = size  # all its tasks, where that is known from the start
        self.may_grow: Callable[[], bool] = _never  # by an unknown number of calls
        self.done = 0  # tasks that have ended, and those of them that failed
        self.failed = 0
        self._server = server
        self._bytes_put = 0
        self._bytes_taken = 0  # two counters, each written by one thread only

    # --- from any thread ------------------------------------------------------------------------------------

    def put(self, item: Item) -> None:
        """Queue a packed call."""
        self._server.check_open()
        self.pending[item] = None
        self._bytes_put += item.size
        self._server.wake(self)

    def leave_out(self) -> None:
        """Count one call less: it runs elsewhere."""
        if self.size is not None:
            self.size -= 1

    def cancel(self) -> None:
        """Drop what has not begun and interrupt what runs; futures of this group become cancelled.

        A running call gets an exception that user code does not catch; one that does not react within
        `skyward.worker.interrupts.GRACE_S` seconds loses its worker process, which is started afresh. What is put
        into the group afterwards is dropped too. Does not wait.
        """
        self.is_cancelled = True
        self.size, self.may_grow = None, _never
        self._server.cancel(self)

    def note(self) -> None:
        """Tell soon how many of its calls are left: more of that is known now."""
        self._server.note(self)

    @property
    def pending_bytes(self) -> int:
        return self._bytes_put - self._bytes_taken

    # --- in the loop ----------------------------------------------------------------------------------------

    def demand(self) -> int:
        """Return how many slots its calls, waiting and running, could use."""
        calls = len(self.pending) + sum(len(items) for items in self.in_flight.values())
        return calls if self.limit is None else min(calls, self.limit)

    def left(self) -> int | None:
        """Return how many tasks have not ended; None while that is not known."""
        if self.size is not None:
            return self.size - self.done
        if self.may_grow():
            return None
        items = [*self.pending, *itertools.chain.from_iterable(self.in_flight.values())]
        return sum(item.call.tasks for item in items)

    def take(self) -> Item:
        """Take the first of the pending calls."""
        item, _ = self.pending.popitem(last=False)
        self._bytes_taken += item.size
        return item

    def take_chunk(self, estimates: Estimates, slots: int) -> list[Item]:
        """Take the calls of the next chunk from the front, to be shared among so many slots."""
        if self.limit is not None:
            slots = min(slots, self.limit)
        remaining = len(self.pending) + (self.expected or 0)
        items: list[Item] = []
        digest, most, size = "", 1, 0
        while self.pending and len(items) < min(most, _CHUNK_CALLS) and size < _CHUNK_BYTES:
            item = self.take()
            single = item.call.alone or item.losses > 0 or item.call.timeout is not None
            if items and (single or item.function.digest != digest):
                self.put_back(item)
                break
            if not items:
                digest = item.function.digest
                most = 1 if single else estimates.chunk_size(digest, remaining, slots)
            size += item.size
            items.append(item)
        return items

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

    def clear(self) -> list[Item]:
        """Remove all calls and return them: those in flight, then those that are pending."""
        items = list(itertools.chain.from_iterable(self.in_flight.values()))
        self.in_flight.clear()
        while self.pending:
            items.append(self.take())
        return items


class FutureGroup(Group):
    """A group whose calls have futures, with a thread that sets them. Made by `Engine.group`."""

    def __init__(
        self, server: Server, packer: Packer, callbacks: Callbacks, limit: int | None, access: Access | None
    ) -> None:
        super().__init__(server, callbacks.put, limit=limit, access=access)
        self.packer = packer
        self._callbacks = callbacks

    def close(self) -> None:
        """End the thread of its callbacks, after those that are due. Nothing is put into the group any more."""
        self.may_grow = _never
        self.packer.close()
        self.note()
        self._callbacks.close(wait=False)


def _never() -> bool:
    return False
