"""The shapes of what travels: a chunk of calls to a worker, one outcome per call back. Plain data, both sides."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, NamedTuple


class Slot(NamedTuple):
    """One place for a call: a thread of a Dask worker."""

    address: str
    node: int
    number: int  # within the node
    threads: int = 1


class BlobRef(NamedTuple):
    """A large buffer that lies in a file of the node, or in the chunk's `blobs`."""

    digest: str
    nbytes: int
    path: str | None  # None: the data comes with the task, under this digest, or is a file of the node


class Access(NamedTuple):
    """How calls see their large buffers: those of more than `over` bytes in `mode`, smaller ones as in mode "c".

    The modes are those of numpy's memory maps: "r" is read-only, "c" is copy-on-write, so that each call has its own
    content, and with "r+" all workers of the machine write into one file.
    """

    mode: Literal["r", "c", "r+"]
    over: int


class Source(NamedTuple):
    """An own module of the caller's, or package: the first on its dotted name that is no namespace package."""

    name: str
    version: str  # a hash of its contents
    file: str  # of the module or of the package's `__init__`: the caller's, or in the archive if there is one
    is_package: bool
    archive: BlobRef | None


class Facts(NamedTuple):
    """What a worker knows of the caller's own modules."""

    sender: str  # the caller's process
    path: tuple[str, ...]  # for `sys.path`
    sources: tuple[Source, ...]
    gone: tuple[str, ...]  # modules that were own


class FunctionRef(NamedTuple):
    """A pickled function; `digest` keys the worker's cache of those that calls may share."""

    digest: str
    data: bytes
    buffers: tuple[BlobRef, ...]


class WireCall(NamedTuple):
    """One call of a chunk: which of its functions, and the pickled ``(args, kwargs)``."""

    function: int
    arguments: bytes
    buffers: tuple[BlobRef, ...]


class Isolation(NamedTuple):
    """What a chunk needs that runs in a separate process.

    `setup` names the module whose `session` makes the process ready; `packages` are those that have to be there, in the
    same version on all participants. `environment` is read by packages when they are imported.
    """

    setup: str
    options: dict[str, Any]
    packages: tuple[str, ...]
    environment: dict[str, str] = {}  # noqa: RUF012 - a NamedTuple's default, and never changed


class Participant(NamedTuple):
    """The part that a task plays in a broadcast."""

    rank: int
    size: int
    worker: int  # among the participants of its node
    workers_per_node: int
    barrier: str | None  # name of the barrier that all participants pass before any of them begins


RUN, TAKE_BACK, INTERRUPT, RAN = "skyward_run", "skyward_take_back", "skyward_interrupt", "skyward-ran"
"""What a worker is asked to do with a chunk, and what it tells the scheduler afterwards."""
LEAVE = "skyward_leave"
"""What a worker is asked to do when its own modules are outdated: end its process."""
KILL = "skyward_kill"
"""What the nanny of a worker is asked to do when that does not answer."""
VALUES = "skyward_values"
"""What a worker is asked for the values of a generator."""
AHEAD_VALUES = 8
AHEAD_BYTES = 64 << 20
"""Values, and bytes of them, that a generator may be ahead of its consumer. Chosen, not measured."""
KEEP, READ, FETCH, DROP = "skyward_keep", "skyward_read", "skyward_fetch", "skyward_drop"
"""What a worker is asked to do with a large buffer."""
PIECE = 8 << 20
"""Bytes of a large buffer that travel in one message."""


def barrier_handler(pool_id: str, *, abort: bool = False) -> str:
    """Return the name of the scheduler's call for waiting at a barrier of the pool, or for ending it."""
    return f"skyward_barrier_{'abort_' if abort else ''}{pool_id}"


@dataclass(slots=True)
class Chunk:
    """What one Dask task runs: calls in order, until done, cancelled or out of time."""

    key: str
    functions: tuple[FunctionRef, ...]
    calls: list[WireCall]
    layout: bytes  # a pickled `Layout`, compressed; the same for many chunks and cached by the worker
    budget_s: float | None  # begin no further call after this many seconds: the rest goes back
    timeout_s: float | None = None  # for the single call of a chunk with a time limit
    participant: Participant | None = None
    isolation: Isolation | None = None
    access: Access | None = None  # None: read-only
    facts: bytes = b""  # pickled `Facts`; bytes, as `layout`
    archives: tuple[BlobRef, ...] = ()  # of the facts

    def __dask_tokenize__(self) -> str:
        return self.key  # Dask would pickle and hash all of it

    def not_in_files(self) -> dict[str, None]:
        """Return the digests of the large buffers that it needs and that are not in files which the worker sees."""
        refs = (*(f.buffers for f in self.functions), *(c.buffers for c in self.calls), self.archives)
        return {ref.digest: None for group in refs for ref in group if ref.path is None}


@dataclass(frozen=True, slots=True)
class Layout:
    """The pool as a worker sees it; addresses are of Dask workers, `nodes[i][j]` is slot j of node i.

    The slots of a node are divided evenly among its parts, in order: its MIG partitions, or 1.
    """

    pool_id: str
    nodes: tuple[tuple[str, ...], ...]
    head_addr: str
    head_port: int
    accelerator: str | None = None
    accelerators_per_node: int = 0
    parts_per_node: int = 1

    def place(self, address: str) -> tuple[int, int] | None:
        for n, slots in enumerate(self.nodes):
            if address in slots:
                return n, slots.index(address)
        return None

    def workers(self, node: int) -> tuple[str, ...]:
        """Return the addresses that stand for a node in a broadcast: the first slot of each of its parts."""
        slots = self.nodes[node]
        return slots[:: max(1, len(slots) // self.parts_per_node)][: self.parts_per_node]


class Kind(IntEnum):
    """How a call ended."""

    VALUE = 0
    ERROR = 1  # the user's exception; `data` is the pickled exception
    OPAQUE = 2  # value or exception could not be pickled; `data` is the pickled SerializationError
    EXIT = 3  # sys.exit; `data` is the pickled code
    TIMEOUT = 4
    CANCELLED = 5  # interrupted on request
    NOT_RUN = 6  # the chunk's time was up before its turn
    DIED = 7  # its own process ended before it did; `data` is the pickled WorkerDiedError
    ABORTED = 8  # the same, by its own doing, as when others have gone


class Outcome(NamedTuple):
    """How one call ended, still pickled: the caller's thread unpickles it."""

    kind: Kind
    data: bytes = b""
    buffers: tuple[Any, ...] = ()
    seconds: float = 0.0
    traceback: str = ""
    machine: str = ""
    warnings: tuple[tuple[str, bytes, str, int], ...] = ()  # (category and text, pickled warning, filename, line)

    @property
    def size(self) -> int:
        return len(self.data) + sum(memoryview(buffer).nbytes for buffer in self.buffers)


@dataclass(slots=True)
class Outcomes:
    """One outcome per call of a chunk, and what was printed until then. Large buffers leave the pickle uncopied.

    `is_outdated`: the process has older versions of own modules; no call has run.
    """

    items: list[Outcome] = field(default_factory=list)
    output: Any = None
    is_outdated: bool = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        if int(protocol) < 5:
            items = [o._replace(buffers=tuple(bytes(b) for b in o.buffers)) if o.buffers else o for o in self.items]
            return Outcomes, (items, self.output, self.is_outdated)
        items = [
            o._replace(buffers=tuple(pickle.PickleBuffer(b) for b in o.buffers)) if o.buffers else o
            for o in self.items
        ]
        return Outcomes, (items, self.output, self.is_outdated)
