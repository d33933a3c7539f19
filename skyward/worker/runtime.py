"""What runs on a worker: a chunk of calls, each kept apart.

Imported by every worker process; imports only facts, and dask where a worker has loaded it anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import inspect
import mmap
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from skyward.errors import SerializationError, SpecError, VersionMismatchError, WorkerDiedError
from skyward.transfer import functions, pickling, sources
from skyward.transfer.wire import (
    Access,
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
from skyward.worker import buffer_files, context, interrupts, raised, ranks
from skyward.worker.variables import variables

# --- running calls ------------------------------------------------------------------------------------------


def _no_output() -> Any:
    return None


take_output: Callable[[], Any] = _no_output
"""Called when a chunk is done: what tasks have printed travels with their outcomes, so that it is there before them."""


prepare: Callable[[], None] | None = None
"""Makes this process ready for its one call, where it has only one."""


def run_batch(chunk: Chunk, *blobs: Any, job: context.Job | None = None) -> Outcomes:
    """Run the calls of `chunk` one after another and return one outcome for each, in order.

    Never raises for what a call does. `blobs` are the large buffers that came with the task, in the order in
    which their digests appear in the chunk. `job` says that this is the separate process that a chunk may ask for.
    """
    worker = _worker()
    outcomes: list[Outcome] = []
    why = Kind.CANCELLED
    try:
        with interrupts.running(chunk.key, watched=chunk.isolation is not None and job is None) as me:
            try:
                _run_calls(chunk, blobs, worker, me, outcomes, job)
            finally:
                why = me.why or why
    except interrupts.Interrupted:  # between two calls
        pass
    outcomes += [Outcome(why)] * (len(chunk.calls) - len(outcomes))
    return Outcomes(outcomes, take_output(), sources.is_outdated)


def _run_calls(
    chunk: Chunk,
    blobs: tuple[Any, ...],
    worker: Any,
    me: interrupts.Running,
    outcomes: list[Outcome],
    job: context.Job | None,
) -> None:
    started = time.perf_counter()
    address = job.address if job else worker.address if worker else ""
    layout = _load_layout(chunk.layout)
    machine = _machine_name(layout, address)
    part = chunk.participant
    if chunk.isolation and job is None:
        assert part is not None
        with _limit(chunk):
            outcomes += _run_isolated(chunk, part, blobs, worker, me, layout)
        return
    token = context.running.set(context.Task(layout, address, part, job.peers if job else ()))
    try:
        shipped = _Shipped(chunk, blobs)
        try:
            if not shipped.install_sources(_scratch(worker)):
                outcomes += [Outcome(Kind.NOT_RUN)] * len(chunk.calls)
                return
        except OSError as exc:  # no room for an archive
            kind, data, buffers, text = _pack_error(exc, None)
            outcomes += [Outcome(kind, data, buffers, traceback=text, machine=machine)] * len(chunk.calls)
            return
        if part and part.barrier and job is None:
            _pass_barrier(worker, layout.pool_id, part)
        with _limit(chunk), _whole_node(part):
            for call in chunk.calls:
                spent = time.perf_counter() - started
                if me.why is not None:
                    outcomes.append(Outcome(Kind.CANCELLED))
                elif outcomes and chunk.budget_s is not None and spent > chunk.budget_s:
                    outcomes.append(Outcome(Kind.NOT_RUN))
                else:
                    outcomes.append(_run_call(chunk, call, shipped, me, machine))
    finally:
        context.running.reset(token)


def _run_call(chunk: Chunk, call: WireCall, shipped: _Shipped, me: interrupts.Running, machine: str) -> Outcome:
    started = time.perf_counter()
    collected: _Warnings = {}
    try:
        kind, data, buffers, text = _result(chunk, call, shipped, collected)
        seconds = time.perf_counter() - started
        return Outcome(kind, data, buffers, seconds, text, machine, _pack_warnings(collected))
    except interrupts.Interrupted:
        return Outcome(me.why or Kind.CANCELLED, seconds=time.perf_counter() - started, machine=machine)
    except BaseException as exc:  # what the user's code raises even when it is asked for a name
        error = SerializationError(
            f"the call's outcome can't be sent back: {type(exc).__name__} was raised while it was packed",
            where="outcome",
        )
        return Outcome(Kind.OPAQUE, pickling.dumps(error)[0], machine=machine)


def _result(
    chunk: Chunk, call: WireCall, shipped: _Shipped, collected: _Warnings
) -> tuple[Kind, bytes, tuple[Any, ...], str]:
    """Make a call and return its outcome's kind, data, large buffers and traceback."""
    fn: Any = None
    try:
        if prepare is not None:
            prepare()
        fn = shipped.function(chunk.functions[call.function])
        args, kwargs = shipped.load(call.arguments, call.buffers)
        _collect_warnings(collected)
        try:  # no context manager: it would set the traceback of what is raised, which a frozen dataclass refuses
            value = fn(*args, **kwargs)
            if inspect.iscoroutine(value):
                # Not by `asyncio.run`, after which later calls have no event loop.
                with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
                    value = runner.run(value)
        finally:
            _collect_warnings(None)
    except interrupts.Interrupted:
        raise
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else raised.text(exc.code)
        return Kind.EXIT, pickling.dumps(code)[0], (), ""
    except BaseException as exc:  # whatever the user's function raises belongs to the caller
        return _pack_error(exc, fn)
    try:
        data, buffers = pickling.dumps(value)
    except interrupts.Interrupted:
        raise
    except BaseException as exc:  # whatever a value's own __reduce__ raises
        error = SerializationError(
            f"{_name(fn)}() returned a {_kind(value)}, which can't be sent back: {raised.text(exc)}. "
            "Return plain data, or data from which it can be created again.",
            where=f"result of {_name(fn)}()",
        )
        return Kind.OPAQUE, pickling.dumps(error)[0], (), ""
    return Kind.VALUE, data, tuple(b.raw() for b in buffers), ""


def _run_isolated(
    chunk: Chunk, part: Participant, blobs: tuple[Any, ...], worker: Any, me: interrupts.Running, layout: Layout
) -> list[Outcome]:
    """Run the one call of a chunk in a separate process, when all participants are here and have what it needs."""
    assert chunk.isolation is not None
    host = context.host_of(worker.address)
    mine: list[Any] = [host, context.free_port(host), [_version(p) for p in chunk.isolation.packages]]
    facts: list[list[Any]] = _pass_barrier(worker, layout.pool_id, part, mine) if part.barrier else [mine]
    if len(facts) < part.size:
        return [Outcome(me.why or Kind.CANCELLED)]  # the others were sent away
    machine = _machine_name(layout, worker.address)
    try:
        _check_versions(chunk.isolation.packages, [f[2] for f in facts])
        job = context.Job(worker.address, tuple(context.Peer(f[0], f[1]) for f in facts))
        token = context.running.set(context.Task(layout, worker.address, part, job.peers))
        try:
            environment = context.world().environment()
        finally:
            context.running.reset(token)
        environment[buffer_files.VARIABLE] = _scratch(worker)
        if cores := _node_cores(part):
            environment |= thread_environment(cores)
        found = ranks.run(chunk.key, (chunk, job), blobs, environment=environment, stop=lambda: me.why)
    except ranks.DiedError as exc:
        error = WorkerDiedError(
            f"the process of rank {part.rank} of {part.size} ended with {exc}; the others were stopped. If it was "
            "killed from outside, the machine may have run out of memory; a crash is in native code. Nothing is "
            "retried: send the call again, from a checkpoint if there is one.",
            machine=worker.address,
            losses=1,
        )
        kind = Kind.ABORTED if exc.was_own_doing else Kind.DIED
        return [Outcome(kind, pickling.dumps(error)[0], machine=machine)]
    except Exception as exc:  # what is missing, or the process could not be started
        kind, data, buffers, text = _pack_error(exc, None)
        return [Outcome(kind, data, buffers, traceback=text, machine=machine)]
    if found is None:
        return [Outcome(me.why or Kind.CANCELLED)]
    return [o._replace(kind=me.why) if me.why and o.kind is Kind.CANCELLED else o for o in found.items]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # it may be there under another name, as tensorflow-cpu is
        return "unknown" if pickling.has_module(package) else None


def _check_versions(packages: tuple[str, ...], found: list[list[str | None]]) -> None:
    """Raise unless every participant has all packages, in the same versions."""
    for package, versions in zip(packages, zip(*found, strict=True), strict=True):
        if missing := [rank for rank, version in enumerate(versions) if version is None]:
            raise SpecError(
                f"{package} is not installed on the pool's machines (ranks {', '.join(map(str, missing))} of "
                f"{len(versions)}): add it, image=sky.Image(pip=[{package!r}])",
                option="image.pip",
                value=None,
                accepted=f"a list with {package!r}",
            )
        if len(set(versions)) > 1:
            shown = ", ".join(f"rank {rank}: {version}" for rank, version in enumerate(versions))
            raise VersionMismatchError(
                f"{package} differs between the participants: {shown}. Name one version in the image: "
                f"sky.Image(pip=['{package}=={versions[0]}'])",
                table=[(package, str(versions[0]), str(v)) for v in versions[1:]],
            )


def _pack_error(exc: BaseException, fn: Any) -> tuple[Kind, bytes, tuple[Any, ...], str]:
    # The first frame is _run_call's; what the user wants to see begins below it.
    tb = exc.__traceback__.tb_next if exc.__traceback__ else None
    text = "".join(traceback.format_exception(type(exc), exc, tb))
    try:
        return Kind.ERROR, *raised.pack(exc), text
    except raised.UnsendableError as problem:
        error = SerializationError(
            f"{_name(fn)}() raised {_kind(exc)}: {raised.text(exc)}\n(this exception does not pickle ({problem}), "
            "so it is shown as text; its traceback is the cause)",
            where=f"exception of {_name(fn)}()",
        )
        return Kind.OPAQUE, pickling.dumps(error)[0], (), text


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


def _scratch(worker: Any) -> str:
    """Return a folder for files of the pool: that of the node, or one that Dask removes with the worker."""
    return os.environ.get(buffer_files.VARIABLE) or str(worker.local_directory if worker else tempfile.gettempdir())


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

_functions: OrderedDict[tuple[str, Access | None], Any] = OrderedDict()
"""Functions that calls may share; None for one that each call unpickles: calls could change it, or it is large."""
_facts = b""  # with which the functions were unpickled
_FUNCTIONS_KEPT = 128  # chosen, not measured: a run seldom has more than a few
_maps: weakref.WeakValueDictionary[str, mmap.mmap] = weakref.WeakValueDictionary()


class _Shipped:
    """Unpickles functions and arguments of one chunk, with their large buffers."""

    def __init__(self, chunk: Chunk, blobs: tuple[Any, ...]) -> None:
        self._access = chunk.access
        self._chunk = chunk
        self._blobs: Mapping[str, Any] = dict(zip(chunk.not_in_files(), blobs, strict=True)) if blobs else {}

    def install_sources(self, folder: str) -> bool:
        """Make the caller's own modules importable; return False if this process has to end for that."""
        global _facts
        facts = self._chunk.facts
        if not sources.install(facts, self._buffer, folder, may_restart=interrupts.may_restart):
            return False
        if facts != _facts:
            _facts = facts
            _functions.clear()  # of modules that may have been imported again
        return True

    def load(self, data: bytes, refs: tuple[BlobRef, ...]) -> Any:
        return pickling.loads(data, [self._buffer(r) for r in refs]) if refs else pickling.loads(data)

    def function(self, ref: FunctionRef) -> Any:
        key = (ref.digest, self._access if ref.buffers else None)
        fn = _functions.get(key)
        if fn is None:
            fn = self.load(ref.data, ref.buffers)
            if key not in _functions:
                _functions[key] = fn if not ref.buffers and functions.is_constant(fn) else None
                while len(_functions) > _FUNCTIONS_KEPT:
                    _functions.popitem(last=False)
        return fn

    def _buffer(self, ref: BlobRef) -> Any:
        access = self._access
        mode = "r" if access is None else access.mode if ref.nbytes > access.over else "c"
        if ref.digest in self._blobs:
            blob = self._blobs[ref.digest]
            return bytearray(blob) if mode == "c" else memoryview(blob).toreadonly()
        path = ref.path or str(buffer_files.path_of(ref.digest))
        if mode == "c":
            return _map(path, ref.nbytes, mmap.ACCESS_COPY)
        found = _maps.get(path)
        if found is None:
            found = _maps[path] = _map(path, ref.nbytes, mmap.ACCESS_READ if mode == "r" else mmap.ACCESS_WRITE)
        return found


def _map(path: str, nbytes: int, access: int) -> mmap.mmap:
    fd = os.open(path, os.O_RDWR if access == mmap.ACCESS_WRITE else os.O_RDONLY)
    try:
        return mmap.mmap(fd, nbytes, access=access)
    finally:
        os.close(fd)


# --- warnings -----------------------------------------------------------------------------------------------

_Warnings = dict[tuple[str, type[Warning], str, int], Warning]
"""The warnings of a call, one for each text, category and place."""
_collector = threading.local()
_show_installed = False
_WARNINGS_KEPT = 100  # distinct places per call; more would be a storm that nobody reads


def _collect_warnings(into: _Warnings | None) -> None:
    """Collect what this thread warns of from now on; None: show it as usual."""
    _install_show()
    _collector.into = into


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
            # Some libraries call this themselves, with a text.
            warning = message if isinstance(message, Warning) else category.__new__(category, message)
            into.setdefault((str(message), category, filename, lineno), warning)

    warnings.showwarning = collect


def _pack_warnings(collected: _Warnings) -> tuple[tuple[str, bytes, str, int], ...]:
    return tuple(
        (f"{_kind(warning)}: {text}", _pack_warning(warning), file, line)
        for (text, _, file, line), warning in collected.items()
    )


def _pack_warning(warning: Warning) -> bytes:
    try:
        data, buffers = raised.pack(warning)
    except raised.UnsendableError:
        return b""
    return b"" if buffers else data


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


def _pass_barrier(worker: Any, pool_id: str, part: Participant, fact: Any = None) -> list[Any]:
    """Wait until every participant is here, so that a collective set-up never waits for a busy slot.

    Returns what each has brought, by rank; less than that when they were sent away.
    """
    from distributed.utils import sync

    wait = getattr(worker.scheduler, barrier_handler(pool_id))
    facts: dict[str, Any] = sync(
        worker.loop, wait, name=part.barrier, count=part.size, rank=str(part.rank), fact=fact
    )
    return [facts[rank] for rank in sorted(facts, key=int)]


_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "LOKY_MAX_CPU_COUNT",  # what joblib.cpu_count() goes by, and with it LightGBM and scikit-learn
)


def thread_environment(cores: int) -> dict[str, str]:
    """Return the environment variables that limit numeric libraries to `cores` threads.

    ``PYTHON_CPU_COUNT`` is not one of them: `os.cpu_count` tells what the machine has.
    """
    return dict.fromkeys(_THREAD_VARIABLES, str(cores))


def _node_cores(part: Participant | None) -> int:
    """Return how many cores the node has, for a participant that is alone there; 0 for all others."""
    return int(os.environ.get("SKYWARD_NODE_CORES", "0")) if part and part.workers_per_node == 1 else 0


@contextlib.contextmanager
def _whole_node(part: Participant | None) -> Iterator[None]:
    """Give a task that is alone on its node, one of a broadcast, all the node's cores."""
    cores = _node_cores(part)
    if not cores:
        yield
        return
    import threadpoolctl

    with variables(thread_environment(cores)), threadpoolctl.threadpool_limits(limits=cores):
        yield
