"""What runs on a worker: a chunk of calls, each kept apart.

Imported by every worker process; imports only facts, and dask where a worker has loaded it anyway.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from skyward.errors import SerializationError
from skyward.transfer import dependencies, pickling, sources
from skyward.transfer.wire import Chunk, Kind, Layout, Outcome, Outcomes, WireCall
from skyward.worker import buffer_files, call_warnings, context, interrupts, raised, time_limit
from skyward.worker.participant import pass_barrier, run_isolated
from skyward.worker.secede import has_seceded
from skyward.worker.threads import whole_node
from skyward.worker.unpickling import Unpickler

LOG_TOPIC = "skyward-logs"
"""Topic of Dask's events under which the caller hears what calls print."""


def _no_output() -> Any:
    return None


take_output: Callable[[], Any] = _no_output
"""Called when a chunk is done: what tasks have printed travels with their outcomes, so that it is there before them."""


prepare: Callable[[], None] | None = None
"""Makes this process ready for its one call, where it has only one."""


Pack = Callable[[Any], tuple[Any, tuple[Any, ...]]]


def pack(value: Any) -> tuple[bytes, tuple[Any, ...]]:
    """Return what a call has returned as (pickle, large buffers)."""
    data, buffers = pickling.dumps(value)
    return data, tuple(b.raw() for b in buffers)


def run_batch(
    chunk: Chunk, *blobs: Any, job: context.Job | None = None, needs: Sequence[Any] = (), pack: Pack = pack
) -> Outcomes:
    """Run the calls of `chunk` one after another and return one outcome for each, in order.

    Never raises for what a call does. `blobs` are the large buffers that came with the task, in the order in
    which their digests appear in the chunk. `job` says that this is the separate process that a chunk may ask for.
    `needs` are the values that its one call needs from others. `pack` makes of a value what its outcome holds.
    """
    worker = current_worker()
    outcomes: list[Outcome] = []
    why = Kind.CANCELLED
    try:
        with interrupts.running(chunk.key, watched=chunk.isolation is not None and job is None) as me:
            try:
                with dependencies.given(needs):
                    _run_calls(chunk, blobs, needs, worker, me, outcomes, job, pack)
            finally:
                why = me.why or why
    except interrupts.Interrupted:  # between two calls
        pass
    has_seceded()
    outcomes += [Outcome(why)] * (len(chunk.calls) - len(outcomes))
    return Outcomes(outcomes, take_output(), sources.is_outdated)


def _run_calls(
    chunk: Chunk,
    blobs: tuple[Any, ...],
    needs: Sequence[Any],
    worker: Any,
    me: interrupts.Running,
    outcomes: list[Outcome],
    job: context.Job | None,
    pack: Pack,
) -> None:
    started = time.perf_counter()
    address = job.address if job else worker.address if worker else ""
    layout = _load_layout(chunk.layout)
    machine = context.machine_name(layout, address)
    part = chunk.participant
    if chunk.isolation and job is None:
        assert part is not None
        with time_limit.limited(chunk.key, chunk.timeout_s):
            outcomes += run_isolated(chunk, part, blobs, needs, worker, me, layout)
        return
    token = context.running.set(context.Task(layout, address, part, job.peers if job else ()))
    try:
        unpickler = Unpickler(chunk, blobs)
        try:
            if not unpickler.install_sources(buffer_files.scratch(worker)):
                outcomes += [Outcome(Kind.NOT_RUN)] * len(chunk.calls)
                return
        except OSError as exc:  # no room for an archive
            kind, data, buffers, text = raised.pack_outcome(exc, None)
            outcomes += [Outcome(kind, data, buffers, traceback=text, machine=machine)] * len(chunk.calls)
            return
        if part and part.barrier and job is None:
            pass_barrier(worker, layout.pool_id, part)
        with time_limit.limited(chunk.key, chunk.timeout_s), whole_node(part):
            for call in chunk.calls:
                spent = time.perf_counter() - started
                if me.why is not None:
                    outcomes.append(Outcome(Kind.CANCELLED))
                elif outcomes and (has_seceded() or (chunk.budget_s is not None and spent > chunk.budget_s)):
                    outcomes.append(Outcome(Kind.NOT_RUN))
                else:
                    outcomes.append(_run_call(chunk, call, unpickler, me, machine, pack))
    finally:
        context.running.reset(token)


def _run_call(
    chunk: Chunk, call: WireCall, unpickler: Unpickler, me: interrupts.Running, machine: str, pack: Pack
) -> Outcome:
    started = time.perf_counter()
    collected: call_warnings.CallWarnings = {}
    try:
        kind, data, buffers, text = _result(chunk, call, unpickler, collected, pack)
        seconds = time.perf_counter() - started
        return Outcome(kind, data, buffers, seconds, text, machine, call_warnings.pack(collected))
    except interrupts.Interrupted:
        return Outcome(me.why or Kind.CANCELLED, seconds=time.perf_counter() - started, machine=machine)
    except BaseException as exc:  # what the user's code raises even when it is asked for a name
        error = SerializationError(
            f"the call's outcome can't be sent back: {type(exc).__name__} was raised while it was packed",
            where="outcome",
        )
        return Outcome(Kind.OPAQUE, pickling.dumps(error)[0], machine=machine)


def _result(
    chunk: Chunk, call: WireCall, unpickler: Unpickler, collected: call_warnings.CallWarnings, pack: Pack
) -> tuple[Kind, bytes, tuple[Any, ...], str]:
    """Make a call and return its outcome's kind, data, large buffers and traceback."""
    fn: Any = None
    try:
        if prepare is not None:
            prepare()
        fn = unpickler.function(chunk.functions[call.function])
        args, kwargs = unpickler.load(call.arguments, call.buffers)
        call_warnings.collect(collected)
        try:  # no context manager: it would set the traceback of what is raised, which a frozen dataclass refuses
            value = fn(*args, **kwargs)
            if inspect.iscoroutine(value):
                # Not by `asyncio.run`, after which later calls have no event loop.
                with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
                    value = runner.run(value)
        finally:
            call_warnings.collect(None)
    except interrupts.Interrupted:
        raise
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else raised.text(exc.code)
        return Kind.EXIT, pickling.dumps(code)[0], (), ""
    except BaseException as exc:  # whatever the user's function raises belongs to the caller
        return raised.pack_outcome(exc, fn)
    try:
        return Kind.VALUE, *pack(value), ""
    except interrupts.Interrupted:
        raise
    except BaseException as exc:  # whatever a value's own __reduce__ raises
        return Kind.OPAQUE, pickling.dumps(raised.not_sendable(fn, "returned", value, exc))[0], (), ""


def current_worker() -> Any:
    """Return the Dask worker that runs in this process, or None."""
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
        layout = _layouts[data] = pickling.loads(zlib.decompress(data))
    return layout
