"""What runs on a worker: a chunk of calls, each kept apart, and the answers to "who am I?".

Imported by every worker process; imports only facts, and dask where a worker has loaded it anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import mmap
import os
import socket
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from skyward import interrupts, pickling, shelf
from skyward.errors import SerializationError
from skyward.wire import (
    BlobRef,
    Chunk,
    FunctionRef,
    Kind,
    Layout,
    Outcome,
    Outcomes,
    Participant,
    WireCall,
    barrier_handler,
)

# --- who am I -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NetworkInfo:
    """How the node is reached by its peers: the address that its workers listen on."""

    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceInfo:
    """Where a task runs, within its pool.

    `node` and `worker` count from 0; `worker` is the part within the node: 0, unless a broadcast reaches several
    workers of a node (MIG partitions, `pool.slots`). `peers` are the addresses of all nodes, in order.
    """

    node: int
    worker: int
    total_nodes: int
    workers_per_node: int
    accelerators: int
    total_accelerators: int
    head_addr: str
    head_port: int
    job_id: str
    peers: tuple[str, ...]
    accelerator: str | None
    network: NetworkInfo

    @property
    def is_head(self) -> bool:
        return self.node == 0 and self.worker == 0

    @property
    def global_worker_index(self) -> int:
        return self.node * self.workers_per_node + self.worker

    @property
    def total_workers(self) -> int:
        return self.total_nodes * self.workers_per_node

    @property
    def is_trainium(self) -> bool:
        return "trainium" in (self.accelerator or "").lower()

    @staticmethod
    def current() -> InstanceInfo | None:
        return instance_info()


@dataclass(frozen=True, slots=True)
class _Task:
    """The task that runs in this context."""

    layout: Layout
    address: str
    participant: Participant | None


_task: ContextVar[_Task | None] = ContextVar("skyward_task", default=None)


def instance_info() -> InstanceInfo | None:
    """Return where the running task is, or None outside a pool's task."""
    task = _task.get()
    if task is None:
        return None
    layout, part = task.layout, task.participant
    node, _slot = layout.place(task.address) or (0, 0)
    hosts = tuple(_host(slots[0]) if slots else "" for slots in layout.nodes)
    return InstanceInfo(
        node=node,
        worker=part.worker if part else 0,
        total_nodes=len(layout.nodes),
        workers_per_node=part.workers_per_node if part else 1,
        accelerators=layout.accelerators_per_node,
        total_accelerators=layout.accelerators_per_node * len(layout.nodes),
        head_addr=layout.head_addr,
        head_port=layout.head_port,
        job_id=layout.pool_id,
        peers=hosts,
        accelerator=layout.accelerator,
        network=NetworkInfo(_host(task.address)),
    )


def current_accelerator() -> str | None:
    """Return the name of the accelerator that the running task's node has, or None."""
    info = instance_info()
    return info.accelerator if info else None


def participant() -> tuple[int, int]:
    """Return (index, count) of the running task in its broadcast; (0, 1) for any other task, and outside one."""
    task = _task.get()
    part = task.participant if task else None
    return (part.rank, part.size) if part else (0, 1)


def _host(address: str) -> str:
    return address.rpartition("://")[2].rpartition(":")[0].strip("[]")


# --- running calls ------------------------------------------------------------------------------------------


def _no_output() -> Any:
    return None


take_output: Callable[[], Any] = _no_output
"""Called when a chunk is done: what tasks have printed travels with their outcomes, so that it is there before them."""


def run_batch(chunk: Chunk, *blobs: Any) -> Outcomes:
    """Run the calls of `chunk` one after another and return one outcome for each, in order.

    Never raises for what a call does. `blobs` are the large buffers that came with the task, in the order in
    which their digests appear in the chunk.
    """
    worker = _worker()
    outcomes: list[Outcome] = []
    why = Kind.CANCELLED
    try:
        with interrupts.running(chunk.key) as me:
            try:
                _run_calls(chunk, blobs, worker, me, outcomes)
            finally:
                why = me.why or why
    except interrupts.Interrupted:  # between two calls
        pass
    outcomes += [Outcome(why)] * (len(chunk.calls) - len(outcomes))
    return Outcomes(outcomes, take_output())


def _run_calls(
    chunk: Chunk, blobs: tuple[Any, ...], worker: Any, me: interrupts.Running, outcomes: list[Outcome]
) -> None:
    started = time.perf_counter()
    address = worker.address if worker else ""
    layout = _load_layout(chunk.layout)
    machine = _machine_name(layout, address)
    token = _task.set(_Task(layout, address, chunk.participant))
    try:
        shipped = _Shipped(chunk, blobs)
        if chunk.participant and chunk.participant.barrier:
            _pass_barrier(worker, layout.pool_id, chunk.participant)
        with _limit(chunk), _whole_node(chunk.participant):
            for call in chunk.calls:
                spent = time.perf_counter() - started
                if me.why is not None:
                    outcomes.append(Outcome(Kind.CANCELLED))
                elif outcomes and chunk.budget_s is not None and spent > chunk.budget_s:
                    outcomes.append(Outcome(Kind.NOT_RUN))
                else:
                    outcomes.append(_run_call(chunk, call, shipped, me, machine))
    finally:
        _task.reset(token)


def _run_call(chunk: Chunk, call: WireCall, shipped: _Shipped, me: interrupts.Running, machine: str) -> Outcome:
    started = time.perf_counter()
    collected: dict[tuple[str, type[Warning], str, int], None] = {}

    def outcome(kind: Kind, data: bytes, buffers: tuple[Any, ...] = (), text: str = "") -> Outcome:
        seconds = time.perf_counter() - started
        return Outcome(kind, data, buffers, seconds, text, machine, _pack_warnings(collected))

    fn: Any = None
    try:
        fn = shipped.function(chunk.functions[call.function])
        args, kwargs = shipped.load(call.arguments, call.buffers)
        with _collect_warnings(collected):
            value = fn(*args, **kwargs)
            if inspect.iscoroutine(value):
                value = asyncio.run(value)
    except interrupts.Interrupted:
        return outcome(me.why or Kind.CANCELLED, b"")
    except SystemExit as exc:
        return outcome(Kind.EXIT, pickling.dumps(exc.code if isinstance(exc.code, int) else str(exc.code))[0])
    except BaseException as exc:  # whatever the user's function raises belongs to the caller
        return outcome(*_pack_error(exc, fn))
    try:
        data, buffers = pickling.dumps(value)
    except Exception as exc:  # whatever a value's own __reduce__ raises
        error = SerializationError(
            f"{_name(fn)}() returned a {_kind(value)}, which can't be sent back: {exc}. "
            "Return plain data, or what it can be made from again.",
            where=f"result of {_name(fn)}()",
        )
        return outcome(Kind.OPAQUE, pickling.dumps(error)[0])
    return outcome(Kind.VALUE, data, tuple(b.raw() for b in buffers))


def _pack_error(exc: BaseException, fn: Any) -> tuple[Kind, bytes, tuple[Any, ...], str]:
    # The first frame is _run_call's; what the user wants to see begins below it.
    tb = exc.__traceback__.tb_next if exc.__traceback__ else None
    text = "".join(traceback.format_exception(type(exc), exc, tb))
    problem: Exception | None = None
    # One with its own __init__ often pickles and yet does not unpickle, for which it can be made without that.
    for form in (exc, _WithoutInit(exc)):
        try:
            data, buffers = pickling.dumps(form)
            pickling.loads(data, buffers)
            return Kind.ERROR, data, tuple(b.raw() for b in buffers), text
        except Exception as why:  # whatever the exception's own pickling raises
            problem = problem or why
    error = SerializationError(
        f"{_name(fn)}() raised {_kind(exc)}: {exc}\n(this exception does not pickle ({problem}), "
        "so it is shown as text; its traceback is the cause)",
        where=f"exception of {_name(fn)}()",
    )
    return Kind.OPAQUE, pickling.dumps(error)[0], (), text


class _WithoutInit:
    """Pickles as an exception that is made from its class, arguments and attributes, without its `__init__`."""

    def __init__(self, exc: BaseException) -> None:
        self._exc = exc

    def __reduce__(self) -> Any:
        exc = self._exc
        if not isinstance(type(exc).__init__, FunctionType):
            raise TypeError(f"{type(exc).__name__} is made by code that is not Python")
        return _make_without_init, (type(exc), exc.args, exc.__dict__)


def _make_without_init(kind: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any]) -> BaseException:
    exc = kind.__new__(kind, *args)
    exc.args = args
    exc.__dict__.update(attributes)
    return exc


def _name(fn: Any) -> str:
    return getattr(fn, "__qualname__", None) or type(fn).__name__


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _worker() -> Any:
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return None
    try:
        return distributed.get_worker()
    except ValueError:  # not in a worker: a unit test
        return None


_layouts: dict[bytes, Layout] = {}


def _load_layout(data: bytes) -> Layout:
    layout = _layouts.get(data)
    if layout is None:
        _layouts.clear()  # the layout changes when nodes come and go: the last one is enough
        layout = _layouts[data] = pickling.loads(data)
    return layout


def _machine_name(layout: Layout, address: str) -> str:
    place = layout.place(address)
    where = f"node {place[0]}, slot {place[1]}, " if place else ""
    return f"{where}{socket.gethostname()}, process {os.getpid()}"


# --- functions and buffers ----------------------------------------------------------------------------------

_functions: OrderedDict[str, Any] = OrderedDict()
_FUNCTIONS_KEPT = 128  # by feel: a run seldom has more than a few
_maps: weakref.WeakValueDictionary[str, mmap.mmap] = weakref.WeakValueDictionary()


class _Shipped:
    """Unpickles functions and arguments of one chunk, with their large buffers."""

    def __init__(self, chunk: Chunk, blobs: tuple[Any, ...]) -> None:
        self._blobs: Mapping[str, Any] = {}
        if blobs:
            digests: dict[str, None] = {}
            for refs in [*(f.buffers for f in chunk.functions), *(c.buffers for c in chunk.calls)]:
                digests.update((r.digest, None) for r in refs if r.path is None)
            self._blobs = dict(zip(digests, blobs, strict=True))

    def load(self, data: bytes, refs: tuple[BlobRef, ...]) -> Any:
        return pickling.loads(data, [self._buffer(r) for r in refs]) if refs else pickling.loads(data)

    def function(self, ref: FunctionRef) -> Any:
        fn = _functions.get(ref.digest)
        if fn is None:
            fn = _functions[ref.digest] = self.load(ref.data, ref.buffers)
            while len(_functions) > _FUNCTIONS_KEPT:
                _functions.popitem(last=False)
        return fn

    def _buffer(self, ref: BlobRef) -> Any:
        if ref.digest in self._blobs:
            return memoryview(self._blobs[ref.digest]).toreadonly()
        path = ref.path or str(shelf.path_of(ref.digest))
        found = _maps.get(path)
        if found is None:
            fd = os.open(path, os.O_RDONLY)
            try:
                found = mmap.mmap(fd, ref.nbytes, access=mmap.ACCESS_READ)
            finally:
                os.close(fd)
            _maps[path] = found
        return found


# --- warnings -----------------------------------------------------------------------------------------------

_collector = threading.local()
_show_installed = False
_WARNINGS_KEPT = 100  # distinct places per call; more would be a storm that nobody reads


@contextlib.contextmanager
def _collect_warnings(into: dict[tuple[str, type[Warning], str, int], None]) -> Iterator[None]:
    _install_show()
    _collector.into = into
    try:
        yield
    finally:
        _collector.into = None


def _install_show() -> None:
    global _show_installed
    if _show_installed:
        return
    _show_installed = True
    show = warnings.showwarning

    def collect(message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any, **more: Any) -> None:
        into = getattr(_collector, "into", None)
        if into is None:
            show(message, category, filename, lineno, *rest, **more)
        elif len(into) < _WARNINGS_KEPT:
            into[str(message), category, filename, lineno] = None

    warnings.showwarning = collect


def _pack_warnings(
    collected: dict[tuple[str, type[Warning], str, int], None],
) -> tuple[tuple[str, bytes, str, int], ...]:
    if not collected:
        return ()
    return tuple((text, pickling.dumps(category)[0], file, line) for text, category, file, line in collected)


# --- time limits --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _limit(chunk: Chunk) -> Iterator[None]:
    """Interrupt the chunk when its time is up."""
    if chunk.timeout_s is None:
        yield
        return
    timer = threading.Timer(chunk.timeout_s, interrupts.interrupt, [[chunk.key], Kind.TIMEOUT])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# --- broadcasts ---------------------------------------------------------------------------------------------


def _pass_barrier(worker: Any, pool_id: str, part: Participant) -> None:
    """Wait until every participant is here, so that a collective set-up never waits for a busy slot."""
    from distributed.utils import sync

    sync(worker.loop, getattr(worker.scheduler, barrier_handler(pool_id)), name=part.barrier, count=part.size)


_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
)


def thread_environment(cores: int) -> dict[str, str]:
    """Return the environment variables that limit numeric libraries to `cores` threads."""
    return dict.fromkeys(_THREAD_VARIABLES, str(cores))


@contextlib.contextmanager
def _whole_node(part: Participant | None) -> Iterator[None]:
    """Give a task that is alone on its node, one of a broadcast, all the node's cores."""
    cores = os.environ.get("SKYWARD_NODE_CORES")
    if part is None or part.workers_per_node > 1 or not cores:
        yield
        return
    import threadpoolctl

    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(thread_environment(int(cores)))
    try:
        with threadpoolctl.threadpool_limits(limits=int(cores)):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
