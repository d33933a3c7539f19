"""How chunks reach a worker without a task of the scheduler in between: its own handlers, for the engine to call.

A chunk waits for the worker's thread as any Dask task does, and tasks wait for it. The scheduler is told: of a chunk
that takes long by `placeholder`, a task that is on that worker as long; of every one by a report afterwards.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import pickle
import threading
import time
from concurrent.futures import Future
from typing import Any

from skyward.transfer import sources
from skyward.transfer.wire import INTERRUPT, LEAVE, RAN, RUN, TAKE_BACK, Chunk, Kind, Outcome, Outcomes
from skyward.worker import interrupts, runtime, value_stream

_here: dict[str, Future[Any]] = {}  # chunks that wait or run in this process
_seceded: set[str] = set()  # those of them that have given their thread back
_ANSWER_S = 0.02
"""Seconds that an answer has to be sent before the process ends; the one who asked takes its end for an answer too."""
_NO_FAILURE = frozenset({Kind.VALUE, Kind.CANCELLED, Kind.NOT_RUN})


def install(worker: Any) -> None:
    """Let `worker`, a Dask worker in this process, take chunks."""
    from distributed.worker_state_machine import SecedeEvent

    async def run(chunk: bytes) -> Any:
        return value_stream.packed(await _run(worker, pickle.loads(chunk)))

    handle = worker.handle_stimulus

    def handle_stimulus(*events: Any) -> None:
        # `secede` and `worker_client` tell the worker's state, which does not know chunks, or only their placeholders.
        handle(*(e for e in events if not (isinstance(e, SecedeEvent) and _secede(worker, e.key))))

    worker.handle_stimulus = handle_stimulus
    worker.handlers[RUN] = run
    worker.handlers[TAKE_BACK] = take_back
    worker.handlers[INTERRUPT] = interrupt
    worker.handlers[LEAVE] = leave
    value_stream.install(worker)


async def _run(worker: Any, chunk: Chunk) -> Outcomes:
    """Run `chunk` in the worker's thread; if it is taken back before that, no call of it has run."""
    if len(_here) == len(_seceded):
        _change_threads(worker, -1)  # so that tasks wait where the scheduler can move them, and not for the thread
    future = worker.executors["default"].submit(contextvars.copy_context().run, _in_thread, worker, chunk)
    _here[chunk.key] = future
    try:
        outcomes: Outcomes
        outcomes, report = await asyncio.wrap_future(future)
    except asyncio.CancelledError:
        if not future.cancelled():
            raise
        return Outcomes([Outcome(Kind.NOT_RUN)] * len(chunk.calls))
    finally:
        _secede(worker, chunk.key)
        del _here[chunk.key]
        _seceded.remove(chunk.key)
    worker.batched_send({"op": RAN, "key": chunk.key, **report})
    return outcomes


def _secede(worker: Any, key: str) -> bool:
    """Take the thread from the chunk `key`, which has seceded or ended, and tell whether there is such a chunk."""
    if key not in _here:
        return False
    if key not in _seceded:
        _seceded.add(key)
        _change_threads(worker, +1)  # which lets one task begin, after the next chunk: they take turns
        if len(_here) > len(_seceded):
            _change_threads(worker, -1)
    return True


def _change_threads(worker: Any, by: int) -> None:
    """Change how many tasks the worker may run at once."""
    from distributed.worker_state_machine import UnpauseEvent

    worker.state.nthreads += by
    if by > 0 and worker.state.running:
        worker.handle_stimulus(UnpauseEvent(stimulus_id="skyward-chunk-ended"))


def _in_thread(worker: Any, chunk: Chunk) -> tuple[Outcomes, dict[str, Any]]:
    # As Dask's own tasks are run, so that get_worker, get_client and secede work in calls.
    from distributed.utils import set_thread_state
    from distributed.worker import _worker_cvar

    began = time.time()
    _worker_cvar.set(worker)
    with set_thread_state(start_time=began, execution_state=worker.execution_state, key=chunk.key):
        outcomes = runtime.run_batch(chunk)
    shift = worker.scheduler_delay
    return outcomes, {
        "start": began + shift,
        "stop": time.time() + shift,
        "thread": threading.get_ident(),
        "has_failed": any(outcome.kind not in _NO_FAILURE for outcome in outcomes.items),
    }


async def take_back(keys: list[str]) -> None:
    """Give back the chunks `keys`, as far as they have not begun."""
    for key in keys:
        if key in _here:
            _here[key].cancel()


async def interrupt(keys: list[str]) -> int:
    """Stop the chunks `keys`, as far as they run here, and return how many did."""
    return interrupts.interrupt(keys)


async def leave() -> None:
    """End this process when this has been answered, if no call may begin here any more."""
    if sources.is_outdated:
        while interrupts.runs_any():  # one that has seceded, or the next chunk on its way back
            await asyncio.sleep(_ANSWER_S)
        asyncio.get_running_loop().call_later(_ANSWER_S, os._exit, 77)  # as for a call that does not stop


def placeholder(key: str) -> None:
    """Do nothing, when the worker has its thread back: until then the scheduler has a task there."""
