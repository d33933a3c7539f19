"""Calls on the caller's side: as they are made, as they travel, and together as a chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from skyward.compute.pending import PendingCompute
from skyward.engine.estimates import Estimates
from skyward.transfer.wire import Access, BlobRef, Chunk, FunctionRef, Isolation, Participant, WireCall


class Stream(Protocol):
    """What hears, in the event loop, where a call of a generator function is."""

    received: int  # values that have arrived

    def sent(self, address: str | None) -> None:
        """The call goes to this worker. None: the scheduler chooses one."""

    def left(self) -> None:
        """The call is on no worker any more."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call to be made on a worker.

    `retries` counts reruns after the call raised; `timeout` is in seconds of run time; `alone` keeps it
    out of chunks with others; `name` is what the Dask dashboard shows; `tasks` is how many it counts for. `owner` is
    an object among the arguments whose method is called: a large one goes to each node once, as large buffers do.
    `origin` is the pending call that it was, by which other calls refer to its value.
    `stream` is where the values of a generator go.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    retries: int = 0
    timeout: float | None = None
    alone: bool = False
    name: str | None = None
    tasks: int = 1
    owner: Any = None
    origin: Any = None
    stream: Stream | None = None

    @property
    def label(self) -> str:
        name = self.name or getattr(self.fn, "__name__", None) or type(self.fn).__name__
        return name.replace("<lambda>", "lambda").strip("<>").replace("-", "_") or "call"


def as_call(pending: PendingCompute[Any]) -> Call:
    """Return a pending call as the engine takes it."""
    fn, args, kwargs = pending.fn, pending.args, pending.kwargs
    return Call(fn, args, kwargs, retries=pending.retries, timeout=pending.timeout, origin=pending)


@dataclass(slots=True, eq=False)
class Item:
    """A packed call on its way: queued, in a chunk, or back in the queue after a loss."""

    call: Call
    index: int
    function: FunctionRef
    arguments: bytes
    buffers: tuple[BlobRef, ...]
    size: int  # bytes of the arguments, and of large buffers that were not stored before
    sink: Any = None  # what the group needs to deliver the outcome
    needs: tuple[Any, ...] = ()  # what gives the values that it needs, see `skyward.engine.graph_builder`
    attempts: int = 0  # runs that ended in the call's own exception
    losses: int = 0  # runs that ended with their worker
    chunk: str = ""  # key of the chunk that it was sent in last
    is_cancelled: bool = False

    @property
    def refs(self) -> tuple[BlobRef, ...]:
        """The large buffers that it uses until it ends."""
        return (*self.buffers, *self.function.buffers)


def now() -> float:
    return time.monotonic()


def batch_label(items: Sequence[Item]) -> str:
    return items[0].call.label


def make_chunk(
    key: str,
    items: Sequence[Item],
    layout: bytes,
    facts: tuple[bytes, tuple[BlobRef, ...]],
    *,
    part: Participant | None = None,
    isolation: Isolation | None = None,
    access: Access | None = None,
) -> Chunk:
    """Return the chunk of these calls: `Roster.pickled_layout` and `Sources.facts` go with each."""
    functions = {item.function.digest: item.function for item in items}
    order = {digest: i for i, digest in enumerate(functions)}
    return Chunk(
        key,
        tuple(functions.values()),
        [WireCall(order[i.function.digest], i.arguments, i.buffers) for i in items],
        layout,
        None if len(items) == 1 else Estimates.BUDGET_S,
        items[0].call.timeout,
        part,
        isolation,
        access,
        *facts,
    )
