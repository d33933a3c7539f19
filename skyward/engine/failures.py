"""What Dask says when a task could not be run, in our own words."""

from __future__ import annotations

import asyncio
import concurrent.futures

from skyward.engine.calls import Call, Item
from skyward.errors import PoolError, SerializationError, WorkerDiedError

WHY_DIED = (
    "Usual causes: out of memory, a crash in native code, or the call ended its own process; "
    "`pool.logs()` has the last lines that it wrote."
)


def died(item: Item, worker: str) -> WorkerDiedError:
    """Return the error for a call that was lost with its worker, which has this name, too often."""
    return WorkerDiedError(
        f"{item.call.label}() was lost with its worker process {item.losses} times, the last time on worker "
        f"{worker}; it is not run again. {WHY_DIED}",
        machine=worker,
        losses=item.losses,
    )


def lost_midway(call: Call, count: int, worker: str) -> WorkerDiedError:
    """Return the error for a generator that was lost with its worker, which has this name."""
    limit = "" if call.timeout is None else f" Or it exceeded its timeout of {call.timeout:g} s in native code."
    return WorkerDiedError(
        f"{call.label}() was lost with its worker process, on worker {worker}, after its first {count} values; it is "
        f"not run again, because these have been used. {WHY_DIED}{limit}",
        machine=worker,
        losses=1,
    )


def not_run(cause: BaseException) -> BaseException:
    """Return the error for a chunk that no worker could run."""
    if isinstance(cause, (asyncio.CancelledError, concurrent.futures.CancelledError)):
        return PoolError("the Dask scheduler dropped the call (did it restart, or was the task cancelled there?)")
    if isinstance(cause, (ImportError, AttributeError)):
        error: BaseException = SerializationError(
            f"the worker could not load the call: {cause}. Is a package missing there? Add it to Image(pip=[...]).",
            where="call",
        )
    else:
        error = PoolError(f"the call could not be run: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
