"""Tasks of a Dask graph: calls that need the values of others, and whose values others need.

Their values stay on the workers as they are, for Dask to bring them where they are needed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import AsyncGeneratorType, GeneratorType
from typing import Any

from skyward.errors import RemoteTraceback
from skyward.transfer.wire import Chunk, Kind, Outcome, Outcomes
from skyward.worker import handlers, raised, runtime

TOPIC = "skyward-calls"
"""Topic of Dask's events under which the caller hears which of these calls have ended, and what they warn of."""
_TELL_S = 0.25
"""Seconds between two such events, unless there are warnings. Chosen, not measured: progress is shown as often."""
KEY = "_skyward_key"
"""Attribute of an exception on its way to the caller: the key of the task that it ended."""
_USER_ERRORS = (Kind.ERROR, Kind.OPAQUE)


class CallFailedError(Exception):
    """Ends the Dask task of a call that has failed. Unpickles as the exception that the caller is to see."""

    def __init__(self, outcome: Outcome, label: str, timeout: float | None, key: str) -> None:
        super().__init__(outcome, label, timeout, key)

    def __reduce__(self) -> Any:
        return _unpack, self.args

    def __str__(self) -> str:
        return f"{self.args[1]}() has failed: {self.args[0].kind.name}"


def _unpack(outcome: Outcome, label: str, timeout: float | None, key: str) -> BaseException:
    error = raised.unpack(outcome, label, timeout)
    vars(error)[KEY] = key
    return error


def run_call(label: str, retries: int, chunk: Chunk, needs: Sequence[Any], blobs: Sequence[Any]) -> Any:
    """Run a call whose value stays on the cluster, and return the value. See `run_last` for the parameters.

    Raises
    ------
    CallFailedError
        There is none.
    """
    outcomes = _run(retries, chunk, needs, blobs, _keep)
    (outcome,) = outcomes.items
    worker = runtime.current_worker()
    if worker is not None:
        if outcomes.output is not None:
            worker.log_event(runtime.LOG_TOPIC, outcomes.output)
        _tell(worker, chunk.key, outcome)
    if outcome.kind is not Kind.VALUE:
        outcome = outcome._replace(buffers=tuple(map(bytes, outcome.buffers)), warnings=())
        error = CallFailedError(outcome, label, chunk.timeout_s, chunk.key)
        # As `raised.unpack` does: tblib, which Dask may use for exceptions, sets it again.
        raise error from RemoteTraceback(outcome.traceback) if outcome.traceback else None
    return outcome.data


_ended: list[tuple[str, Any]] = []  # calls of which the caller has not heard, each with its warnings
_told = 0.0


def _tell(worker: Any, key: str, outcome: Outcome) -> None:
    global _told
    _ended.append((key, outcome.warnings))
    now = time.monotonic()
    if outcome.warnings or now - _told >= _TELL_S:
        worker.log_event(TOPIC, {"ended": _ended[:]})
        _ended.clear()
        _told = now


def run_last(retries: int, chunk: Chunk, needs: Sequence[Any], blobs: Sequence[Any]) -> Outcomes:
    """Run a call whose value goes to the caller.

    Parameters
    ----------
    retries
        How often it runs again after it raised.
    chunk
        The call.
    needs, blobs
        The values of the calls that it needs, and the large buffers that travel beside the chunk.
    """
    return _run(retries, chunk, needs, blobs, runtime.pack)


def send_value(value: Any) -> Outcomes:
    """Return a value that was kept for other calls, as the caller wants it."""
    return Outcomes([Outcome(Kind.VALUE, *runtime.pack(value))])


def _keep(value: Any) -> tuple[Any, tuple[Any, ...]]:
    if isinstance(value, (GeneratorType, AsyncGeneratorType)):
        raise TypeError("a generator can be read only once, and only here")
    return value, ()


def _run(retries: int, chunk: Chunk, needs: Sequence[Any], blobs: Sequence[Any], pack: runtime.Pack) -> Outcomes:
    for _ in range(retries + 1):
        outcomes = runtime.run_batch(chunk, *blobs, needs=needs, pack=pack)
        if outcomes.is_outdated:
            _leave()
        if outcomes.items[0].kind not in _USER_ERRORS:
            break
    return outcomes


def _leave() -> None:
    """Have this process ended, and its task run elsewhere."""
    from distributed import Reschedule

    worker = runtime.current_worker()
    worker.loop.add_callback(handlers.leave)
    raise Reschedule

