"""What calls raise and warn of: packed on the worker, made again by the caller.

Pickling, unpickling and even printing an exception may run the user's code, which may raise anything.
"""

from __future__ import annotations

import traceback
from types import FunctionType
from typing import Any

from skyward import user_errors
from skyward.errors import RemoteTraceback, SerializationError, TaskExitError
from skyward.transfer import pickling
from skyward.transfer.wire import Kind, Outcome
from skyward.worker import interrupts

_set = BaseException.__setattr__
"""Sets an attribute past the class's own `__setattr__`: that of a frozen dataclass raises."""


class UnsendableError(Exception):
    """The exception can't be pickled, or not unpickled again."""


def pack(exc: BaseException) -> tuple[bytes, tuple[Any, ...]]:
    """Return an exception or a warning as (pickle, large buffers), which were seen to unpickle.

    Raises
    ------
    UnsendableError
        They can't be made.
    """
    problem = ""
    # One with its own __init__ often pickles and yet does not unpickle, for which it can be made without that.
    for form in (exc, _WithoutInit(exc)):
        try:
            data, buffers = pickling.dumps(form)
            if isinstance(pickling.loads(data, buffers), BaseException):
                return data, tuple(b.raw() for b in buffers)
            problem = problem or "it unpickles to something else"
        except interrupts.Interrupted:
            raise
        except BaseException as why:  # whatever the exception's own pickling raises
            problem = problem or text(why)
    raise UnsendableError(problem)


def pack_outcome(exc: BaseException, fn: Any) -> tuple[Kind, bytes, tuple[Any, ...], str]:
    """Return the kind, data, large buffers and traceback of the outcome of a call of `fn` that has raised."""
    # The first frame is the runtime's; what the user wants to see begins below it.
    tb = exc.__traceback__.tb_next if exc.__traceback__ else None
    trace = "".join(traceback.format_exception(type(exc), exc, tb))
    try:
        return Kind.ERROR, *pack(exc), trace
    except UnsendableError as problem:
        error = SerializationError(
            f"{name_of(fn)}() raised {kind_of(exc)}: {text(exc)}\n(this exception does not pickle ({problem}), "
            "so it is shown as text; its traceback is the cause)",
            where=f"exception of {name_of(fn)}()",
        )
        return Kind.OPAQUE, pickling.dumps(error)[0], (), trace


def not_sendable(fn: Any, did: str, value: object, cause: BaseException) -> SerializationError:
    """Return the error for what a call has returned or yielded, if that can't be pickled."""
    where = f"result of {name_of(fn)}()"
    if "generator' object" in text(cause):
        return SerializationError(
            f"{name_of(fn)}() {did} a {kind_of(value)}, which can't be sent back: {text(cause)}. "
            "Decorate the generator function itself with @sky.compute, and iterate over `fn(...) >> pool`.",
            where=where,
        )
    return SerializationError(
        f"{name_of(fn)}() {did} a {kind_of(value)}, which can't be sent back: {text(cause)}. "
        "Send plain data, or data from which it can be created again.",
        where=where,
    )


def name_of(fn: Any) -> str:
    return getattr(fn, "__qualname__", None) or type(fn).__name__


def kind_of(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def text(exc: object) -> str:
    """Return ``str(exc)``, or the name of its class if that raises."""
    try:
        return str(exc)
    except interrupts.Interrupted:
        raise
    except BaseException:  # whatever its own __str__ raises
        return f"<{type(exc).__name__}, whose text can't be made>"


def unpack(outcome: Outcome, label: str, timeout: float | None) -> BaseException:
    """Return the exception of a call, of this name and time limit, whose outcome is no value."""
    match outcome.kind:
        case Kind.TIMEOUT:
            return TimeoutError(f"{label}() did not end within its timeout of {timeout:g} s")
        case Kind.EXIT:
            code = pickling.loads(outcome.data)
            return TaskExitError(
                f"{label}() called sys.exit({code!r}) on {outcome.machine}. "
                "Return a value or raise an exception instead.",
                code=code,
            )
    try:
        error: BaseException = pickling.loads(outcome.data, outcome.buffers)
        annotate(error, outcome.traceback, f"raised on {outcome.machine}")
    except BaseException as exc:  # its class needs a package that only the worker has; or its __setstate__
        if isinstance(exc, KeyboardInterrupt) and user_errors.ends_program(exc):
            raise
        error = unreadable(f"the exception of {label}()", exc)
        annotate(error, outcome.traceback, f"raised on {outcome.machine}")
    return error


def unreadable(what: str, cause: BaseException) -> SerializationError:
    """Return the error for something that arrived and can't be unpickled."""
    error = SerializationError(
        f"{what} arrived, but can't be unpickled here: {text(cause)}. Is a package missing on this side?",
        where=what,
    )
    error.__cause__ = cause
    return error


def annotate(error: BaseException, trace: str, note: str) -> None:
    """Give an exception that came from a worker its traceback there, as its cause, and a note."""
    _set(error, "__traceback__", None)  # some libraries make it travel; the text says it all, once
    if trace:
        _set(error, "__cause__", RemoteTraceback(trace))
    add_note(error, note)


def add_note(error: BaseException, note: str) -> None:
    """Add a note to an exception, once, whatever its class and earlier notes are."""
    found = vars(error).get("__notes__")
    notes = found if isinstance(found, list) else []
    if note not in notes:
        _set(error, "__notes__", [*notes, note])


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
    _set(exc, "args", args)
    exc.__dict__.update(attributes)
    return exc
