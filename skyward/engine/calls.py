"""Calls on the caller's side: packed once in the thread that makes them, decoded in the thread that wants them."""

from __future__ import annotations

import logging
import math
import operator
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import xxhash

from skyward import guard
from skyward.engine.captured import captured
from skyward.engine.sources import REST_S, Sources
from skyward.engine.store import SeenBuffers, Store
from skyward.engine.writable import WritableArrays
from skyward.errors import SerializationError, TaskExitError
from skyward.transfer import pickling
from skyward.transfer.wire import Access, BlobRef, FunctionRef, Kind, Outcome
from skyward.worker import raised

logger = logging.getLogger(__name__)

_APART_BYTES = 64 << 20
"""Pickled arguments of so many bytes travel as large buffers do: messages would be copied several times."""
_FUNCTIONS_BYTES = 16 << 20
"""Bytes of pickled functions after which a group forgets those that it knows. Chosen, not measured."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call to be made on a worker.

    `retries` counts reruns after the call raised; `timeout` is in seconds of run time; `alone` keeps it
    out of chunks with others; `name` is what the Dask dashboard shows; `tasks` is how many it counts for. `owner` is
    an object among the arguments whose method is called: a large one goes to each node once, as large buffers do.
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

    @property
    def label(self) -> str:
        name = self.name or getattr(self.fn, "__name__", None) or type(self.fn).__name__
        return name.replace("<lambda>", "lambda").strip("<>").replace("-", "_") or "call"


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
    attempts: int = 0  # runs that ended in the call's own exception
    losses: int = 0  # runs that ended with their worker
    chunk: str = ""  # key of the chunk that it was sent in last
    is_cancelled: bool = False

    @property
    def refs(self) -> tuple[BlobRef, ...]:
        """The large buffers that it uses until it ends."""
        return (*self.buffers, *self.function.buffers)


class Packer:
    """Packs the calls of one group: each function once, each large buffer once per identity.

    With `unchanged`, the caller's code does not run between two calls, so functions and arrays stay as they were.
    Otherwise both are looked at again for each call: see `SeenBuffers` and `captured`. Own modules are looked at for
    the first call, if `eager`, and then after a rest: see `Sources.look`. `access` is how calls see the large buffers;
    None: read-only.
    """

    def __init__(
        self,
        store: Store,
        sources: Sources,
        *,
        unchanged: bool = False,
        access: Access | None = None,
        eager: bool = True,
    ) -> None:
        self._store = store
        self._sources = sources
        self._rest_s = 0.0 if eager else REST_S
        self._unchanged = unchanged
        self._seen: SeenBuffers | WritableArrays = SeenBuffers(store, unchanged=unchanged)
        if access is not None and access.mode == "r+":
            self._seen = WritableArrays(store, over=access.over)
        self._out_of_band = pickling.OUT_OF_BAND
        if access is not None and access.mode != "c":
            self._out_of_band = min(self._out_of_band, access.over + 1)
        self._functions: dict[int, _Packed] = {}
        self._functions_bytes = 0
        self._large: Any = None  # the last object of a bound method that was large when pickled

    def pack(self, call: Call, index: int = 0, sink: Any = None) -> Item:
        """Pickle `call`.

        Raises
        ------
        SerializationError
            The function or an argument can't be pickled; the message names it.
        """
        fn: Any = call.fn
        args, kwargs, owner = call.args, dict(call.kwargs), call.owner
        if isinstance(fn, MethodType):  # its object is an argument as any other
            fn, owner = fn.__func__, fn.__self__
            args = (owner, *args)
        before = self._store.written_bytes
        try:
            function = self._function(fn)
            apart = owner if owner is self._large else None
            data, buffers = self._dumps((args, kwargs), apart)
            if len(data) >= pickling.OUT_OF_BAND and owner is not None:
                self._large = owner
                data, buffers = self._dumps((args, kwargs), owner)
            self._sources.look(self._rest_s)
            self._rest_s = math.inf if self._unchanged else REST_S
        except (SerializationError, MemoryError):
            raise
        except Exception as exc:  # whatever an object's own __reduce__ raises
            raise pickling.explain_call(fn, args, kwargs, exc) from exc
        refs = tuple(self._seen.put(b) for b in buffers)
        if len(data) >= _APART_BYTES:
            refs = (self._store.put(memoryview(data)), *refs)
            data = pickling.loader(len(buffers))
        size = len(data) + self._store.written_bytes - before
        return Item(call, index, function, data, refs, size, sink)

    def _dumps(self, obj: object, apart: object = None) -> tuple[bytes, Sequence[pickling.Buffer]]:
        return pickling.dumps(
            obj, self._sources.refer, out_of_band=self._out_of_band, apart=apart, files=self._store.has_files
        )

    def close(self) -> None:
        """Let go of what is kept for the group. Nothing more is packed."""
        self._large = None
        if isinstance(self._seen, WritableArrays):
            self._seen.close()

    def _function(self, fn: Callable[..., Any]) -> FunctionRef:
        known = self._functions.get(id(fn))
        if (
            known is not None
            and (self._unchanged or known.is_same())
            and (not known.ref.buffers or self._store.reuse(known.ref.buffers))
        ):
            return known.ref
        state = None if self._unchanged else captured(fn)
        data, buffers = self._dumps(fn)
        refs = tuple(self._seen.put(b) for b in buffers)
        hasher = xxhash.xxh3_128(data)
        for ref in refs:
            hasher.update(ref.digest.encode())
        digest = hasher.hexdigest()
        if known is None or known.ref.digest != digest:
            if len(data) > 1 << 20:
                _warn_of_large(fn, len(data))
            known = _Packed(fn, FunctionRef(digest, data, refs), None)
        known.state = state
        self._functions_bytes += len(data)
        if len(self._functions) >= 256 or self._functions_bytes > _FUNCTIONS_BYTES:  # a stream of lambdas, for example
            self._functions.clear()
            self._functions_bytes = len(data)
        self._functions[id(fn)] = known
        return known.ref


@dataclass(slots=True)
class _Packed:
    """A function that was pickled, and what it had captured then. Keeps `fn`, so that no other object gets its id."""

    fn: Callable[..., Any]
    ref: FunctionRef
    state: list[Any] | None

    def is_same(self) -> bool:
        """Tell whether the function would certainly be pickled to the same again."""
        if self.state is None:
            return False
        now = captured(self.fn)
        return now is not None and len(now) == len(self.state) and all(map(operator.is_, now, self.state))


def _warn_of_large(fn: Callable[..., Any], size: int) -> None:
    name = getattr(fn, "__qualname__", type(fn).__name__)
    warnings.warn(
        f"function {name}() weighs {size / 1e6:.1f} MB when pickled, mostly what it captures, and travels with "
        "every chunk of calls; pass large objects as arguments instead",
        stacklevel=2,
    )


class Decoder:
    """Turns outcomes into values or exceptions, and issues the tasks' warnings again, once per place."""

    def __init__(self) -> None:
        self._registry: dict[Any, Any] = {}

    def decode(self, call: Call, outcome: Outcome | BaseException) -> tuple[bool, Any]:
        """Return (True, value) or (False, exception)."""
        if isinstance(outcome, BaseException):
            return False, outcome
        for text, data, filename, line in outcome.warnings:
            try:
                self._warn(text, data, filename, line)
            except Warning as warning:  # the caller's filters make an error of it, so it is the call's
                return False, warning
            except Exception:  # whatever the warning's __str__, or the caller's `warnings.showwarning`, raises
                guard.log(logger, "a warning of %s() can't be shown: %s", call.label, text)
        if outcome.kind is Kind.VALUE:
            try:
                return True, pickling.loads(outcome.data, outcome.buffers)
            except BaseException as exc:  # its class needs a package that only the worker has; or its __setstate__
                if isinstance(exc, KeyboardInterrupt) and guard.ends_program(exc):
                    raise
                return False, _unreadable(f"the result of {call.label}()", exc)
        return False, self._error(call, outcome)

    def _error(self, call: Call, outcome: Outcome) -> BaseException:
        match outcome.kind:
            case Kind.TIMEOUT:
                return TimeoutError(f"{call.label}() did not end within its timeout of {call.timeout:g} s")
            case Kind.EXIT:
                code = pickling.loads(outcome.data)
                return TaskExitError(
                    f"{call.label}() called sys.exit({code!r}) on {outcome.machine}. "
                    "Return a value or raise an exception instead.",
                    code=code,
                )
        try:
            error: BaseException = pickling.loads(outcome.data, outcome.buffers)
            raised.annotate(error, outcome.traceback, f"raised on {outcome.machine}")
        except BaseException as exc:  # as above
            if isinstance(exc, KeyboardInterrupt) and guard.ends_program(exc):
                raise
            error = _unreadable(f"the exception of {call.label}()", exc)
            raised.annotate(error, outcome.traceback, f"raised on {outcome.machine}")
        return error

    def _warn(self, text: str, data: bytes, filename: str, line: int) -> None:
        try:
            warning = pickling.loads(data)
        except Exception:  # its category is one that only the worker knows: the text matters more
            warning = UserWarning(text)
        warnings.warn_explicit(warning, type(warning), filename, line, registry=self._registry)


def _unreadable(what: str, cause: BaseException) -> SerializationError:
    error = SerializationError(
        f"{what} arrived, but can't be unpickled here: {raised.text(cause)}. Is a package missing on this side?",
        where=what,
    )
    error.__cause__ = cause
    return error


class Estimates:
    """Running time per call of each function, from what workers measured."""

    TARGET_S = 0.2
    """Seconds of work that a chunk should hold: much more than its overhead, little enough to share out evenly."""
    FLOOR_S = 0.005
    """A chunk is not made shorter than this for the sake of sharing; below it, overhead would rule."""
    LONG_S = 1.0
    """Beside a call of so many seconds, the wait for the next one is short, even where machines are far away."""
    BUDGET_S = 0.3
    """After this many seconds a worker returns the calls of a chunk that it has not begun."""
    KEPT = 1024
    """Functions that are remembered, those that ran last."""

    def __init__(self) -> None:
        self._totals: dict[str, tuple[float, float]] = {}  # seconds and calls

    def observe(self, digest: str, seconds: float, calls: int) -> None:
        if not calls:
            return
        # The last chunks count most, and among them the large ones.
        before, runs = self._totals.pop(digest, (0.0, 0.0))
        if len(self._totals) >= self.KEPT:  # a function whose state changes has another digest each time
            del self._totals[next(iter(self._totals))]
        self._totals[digest] = 0.5 * before + seconds, 0.5 * runs + calls

    def mean(self, digest: str) -> float | None:
        """Return the seconds that a call of a function takes; None when that is not known."""
        seconds, calls = self._totals.get(digest, (0.0, 0.0))
        return seconds / calls if calls else None

    def is_short(self, digest: str) -> bool:
        """Tell whether calls of a function are known to take less than `LONG_S`."""
        seconds = self.mean(digest)
        return seconds is not None and seconds < self.LONG_S

    def chunk_calls(self, digest: str) -> int:
        """Return how many calls of a function a chunk holds when there are plenty; 1 when nothing is known of it."""
        seconds = self.mean(digest)
        return 1 if seconds is None else max(1, int(self.TARGET_S / max(seconds, 1e-7)))

    def chunk_size(self, digest: str, remaining: int, slots: int) -> int:
        """Return how many of the `remaining` calls of one function the next chunk should hold; at least 1."""
        share = max(1, remaining // (2 * max(1, slots)))  # two chunks a slot are left: small ones at the end
        seconds = self.mean(digest)
        if seconds is None:
            # Nothing is known. A few at a time when there are plenty; the budget mends a wrong guess.
            return max(1, min(16, share // 8))
        least = max(1, int(self.FLOOR_S / max(seconds, 1e-7)))
        return min(self.chunk_calls(digest), max(share, least))


def now() -> float:
    return time.monotonic()


def batch_label(items: Sequence[Item]) -> str:
    return items[0].call.label
