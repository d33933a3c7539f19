"""Pending calls, one or many, and the operators that send them to a pool.

Pure data, no I/O: what a target does with a call is the target's business. Imports nothing but errors, because
``import skyward`` loads this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, Protocol, TypeVar, TypeVarTuple, overload

from skyward.current import resolve

if TYPE_CHECKING:
    from skyward.engine.persisted import Persisted

R = TypeVar("R")
S = TypeVar("S")
R_co = TypeVar("R_co", covariant=True)
Ts = TypeVarTuple("Ts")
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
E = TypeVar("E")
F = TypeVar("F")


# --- where calls go -----------------------------------------------------------------------------------------


class BroadcastTarget(Protocol):
    """What may stand to the right of ``@``."""

    def broadcast(self, pending: PendingCompute[R], /) -> tuple[R, ...]: ...


class Target(BroadcastTarget, Protocol):
    """What may stand to the right of ``>>``: a pool, or something that runs calls as a pool does."""

    def run(self, pending: PendingCompute[R], /) -> R: ...
    def run_batch(self, batch: PendingBatch[*Ts], /) -> tuple[*Ts]: ...
    def run_stream(self, stream: PendingStream[R], /) -> Iterator[R]: ...


# --- calls --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False, repr=False, weakref_slot=True)
class PendingCompute(Generic[R_co]):
    """A call that has not run: ``>> target`` runs it once, ``@ target`` on every node, ``&`` beside others.

    `retries` counts reruns after the call raised; `timeout` is in seconds of its run time.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    retries: int = 0
    timeout: float | None = None

    def __rshift__(self, target: Target | ModuleType) -> R_co:
        value: R_co = resolve(target, _shown(self), "run").run(self)
        return value

    def __matmul__(self, target: BroadcastTarget | ModuleType) -> tuple[R_co, ...]:
        values: tuple[R_co, ...] = resolve(target, _shown(self), "broadcast").broadcast(self)
        return values

    @overload
    def __and__(self, other: PendingCompute[S]) -> PendingBatch[R_co, S]: ...
    @overload
    def __and__(self, other: PendingBatch[*Ts]) -> PendingBatch[R_co, *Ts]: ...
    def __and__(self, other: Any) -> Any:
        return PendingBatch((self,)) & other

    def __repr__(self) -> str:
        return f"<PendingCompute {_shown(self)}>"

    def __bool__(self) -> NoReturn:
        raise TypeError(_unused(_shown(self), "has no truth value"))

    if not TYPE_CHECKING:  # a type checker says it by itself when they are not there

        def __iter__(self) -> NoReturn:
            raise TypeError(_unused(_shown(self), "can't be iterated over"))

        def __await__(self) -> NoReturn:
            what = _shown(self)
            raise TypeError(
                f"`{what}` has not run and can't be awaited. In a coroutine use "
                f"`await asyncio.wrap_future(pool.submit({what}))`; elsewhere `{what} >> pool`"
            )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PendingGenerator(PendingCompute[Iterator[R]]):
    """A call of a generator function: ``>> target`` gives an iterator of its values, and is all that it can do."""

    def __matmul__(self, target: Any) -> NoReturn:
        self.refuse()

    def __and__(self, other: Any) -> NoReturn:
        self.refuse()

    def refuse(self) -> NoReturn:
        """Raise `TypeError`: a single value is wanted."""
        what = _shown(self)
        raise TypeError(
            f"`{what}` is a call of a generator function, whose values arrive one by one: it runs on one worker, by "
            f"itself. Iterate over them: `for value in {what} >> pool`"
        )


def one_value(call: PendingCompute[R]) -> PendingCompute[R]:
    """Return the call, or raise `TypeError` if it is of a generator function."""
    if isinstance(call, PendingGenerator):
        call.refuse()
    return call


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PendingBatch(Generic[*Ts]):
    """Calls to be run in parallel: ``>> target`` gives a tuple of their values, in order."""

    calls: tuple[PendingCompute[Any], ...]
    return_exceptions: bool = False

    def __rshift__(self, target: Target | ModuleType) -> tuple[*Ts]:
        values: Any = resolve(target, "(a & b)", "run_batch").run_batch(self)
        return values  # type: ignore[no-any-return]

    @overload
    def __and__(self, other: PendingCompute[S]) -> PendingBatch[*Ts, S]: ...
    @overload
    def __and__(self, other: PendingBatch[*tuple[Any, ...]]) -> PendingBatch[*tuple[Any, ...]]: ...
    def __and__(self, other: Any) -> Any:
        if isinstance(other, PendingCompute):
            return replace(self, calls=(*self.calls, one_value(other)))
        if isinstance(other, PendingBatch):
            return replace(self, calls=self.calls + other.calls)
        if isinstance(other, NotCalled):
            raise TypeError(_not_called(other, "&"))
        raise TypeError(
            f"can't put a {type(other).__name__} into a batch; `>>` binds tighter than `&`, so write `(a & b) >> pool`"
        )

    def __len__(self) -> int:
        return len(self.calls)

    def __repr__(self) -> str:
        return f"<PendingBatch of {len(self.calls)} calls>"

    def __bool__(self) -> NoReturn:
        raise TypeError(_unused("(a & b)", "has no truth value"))

    if not TYPE_CHECKING:

        def __iter__(self) -> NoReturn:
            raise TypeError(_unused("(a & b)", "can't be iterated over"))

        def __await__(self) -> NoReturn:
            raise TypeError(_unused("(a & b)", "can't be awaited"))

        def __matmul__(self, target: Any) -> NoReturn:
            raise TypeError("a batch can't run on every node: use `@` with each of its calls")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PendingStream(Generic[R_co]):
    """Calls taken from an iterable as slots get free: ``>> target`` gives an iterator of their values."""

    calls: Iterable[PendingCompute[R_co]]
    ordered: bool = True
    return_exceptions: bool = False

    def __rshift__(self, target: Target | ModuleType) -> Iterator[R_co]:
        values: Iterator[R_co] = resolve(target, "gather(..., stream=True)", "run_stream").run_stream(self)
        return values

    def __repr__(self) -> str:
        return f"<PendingStream {'ordered' if self.ordered else 'unordered'}>"

    if not TYPE_CHECKING:

        def __iter__(self) -> NoReturn:
            raise TypeError(_unused("gather(..., stream=True)", "can't be iterated over"))


class NotCalled:
    """A function that makes pending calls. To send the function itself is a mistake, which the operators explain."""

    __name__: str

    if not TYPE_CHECKING:  # a type checker says it by itself when they are not there

        def __rshift__(self, target: Any) -> NoReturn:
            raise TypeError(_not_called(self, ">>"))

        def __matmul__(self, target: Any) -> NoReturn:
            raise TypeError(_not_called(self, "@"))

        def __and__(self, other: Any) -> NoReturn:
            raise TypeError(_not_called(self, "&"))


def _unused(what: str, problem: str) -> str:
    return f"`{what}` is a call that has not run, so it {problem}. Run it: `{what} >> pool`, or `>> sky` inside a pool"


def _not_called(fn: NotCalled, operator: str) -> str:
    name = fn.__name__
    return f"`{name}` was not called: write `{name}(...) {operator} ...`, with its arguments"


def _shown(pending: PendingCompute[Any]) -> str:
    """Return the call as source-like text, short whatever the arguments are."""
    name = getattr(pending.fn, "__name__", type(pending.fn).__name__)
    return f"{name}({'...' if pending.args or pending.kwargs else ''})"


@overload
def ref(call: Persisted[R], /) -> R: ...  # first, because its base class is untyped and would match anything
@overload
def ref(call: PendingCompute[R], /) -> R: ...
@overload
def ref(call: PendingBatch[*Ts], /) -> tuple[*Ts]: ...
def ref(call: Any, /) -> Any:
    """Return `call` itself, typed as its value, for type checkers: ``score(sky.ref(train(0.1)), part)``.

    At run time a bare call works as well: where a call is an argument of another one, that one gets its value.
    """
    return call


# --- many calls ---------------------------------------------------------------------------------------------

_Calls = Iterable[PendingCompute[R]]


@overload
def gather(
    calls: _Calls[R], /, *, stream: Literal[True], ordered: bool = True, return_exceptions: Literal[False] = False
) -> PendingStream[R]: ...
@overload
def gather(
    *calls: PendingCompute[R],
    stream: Literal[True],
    ordered: bool = True,
    return_exceptions: Literal[False] = False,
) -> PendingStream[R]: ...
@overload
def gather(
    calls: _Calls[R], /, *, stream: Literal[True], ordered: bool = True, return_exceptions: Literal[True]
) -> PendingStream[R | BaseException]: ...
@overload
def gather(
    *calls: PendingCompute[R], stream: Literal[True], ordered: bool = True, return_exceptions: Literal[True]
) -> PendingStream[R | BaseException]: ...
@overload
def gather(
    calls: _Calls[R], /, *, return_exceptions: Literal[True]
) -> PendingBatch[*tuple[R | BaseException, ...]]: ...
@overload
def gather(
    *calls: PendingCompute[R], return_exceptions: Literal[True]
) -> PendingBatch[*tuple[R | BaseException, ...]]: ...
@overload
def gather(a: PendingCompute[A], /) -> PendingBatch[A]: ...
@overload
def gather(a: PendingCompute[A], b: PendingCompute[B], /) -> PendingBatch[A, B]: ...
@overload
def gather(a: PendingCompute[A], b: PendingCompute[B], c: PendingCompute[C], /) -> PendingBatch[A, B, C]: ...
@overload
def gather(
    a: PendingCompute[A], b: PendingCompute[B], c: PendingCompute[C], d: PendingCompute[D], /
) -> PendingBatch[A, B, C, D]: ...
@overload
def gather(
    a: PendingCompute[A], b: PendingCompute[B], c: PendingCompute[C], d: PendingCompute[D], e: PendingCompute[E], /
) -> PendingBatch[A, B, C, D, E]: ...
@overload
def gather(
    a: PendingCompute[A],
    b: PendingCompute[B],
    c: PendingCompute[C],
    d: PendingCompute[D],
    e: PendingCompute[E],
    f: PendingCompute[F],
    /,
) -> PendingBatch[A, B, C, D, E, F]: ...
@overload
def gather(calls: _Calls[R], /) -> PendingBatch[*tuple[R, ...]]: ...
@overload
def gather(*calls: PendingCompute[R]) -> PendingBatch[*tuple[R, ...]]: ...
def gather(*calls: Any, stream: bool = False, ordered: bool = True, return_exceptions: bool = False) -> Any:
    """Put any number of calls together, to be run in parallel by ``>>``.

    Parameters
    ----------
    calls
        The calls, or one iterable of them.
    stream
        ``>>`` gives an iterator, which yields values as they come; the iterable is read only as far ahead as the
        slots need, so it may be endless. Otherwise it gives a tuple.
    ordered
        With `stream`: yield in the order of the calls (True), or as they end.
    return_exceptions
        Exceptions are returned among the values. Otherwise the first exception cancels the other calls and is raised.

    Raises
    ------
    TypeError
        One of them is not a call.
    """
    source: Iterable[Any] = calls
    if len(calls) == 1 and not isinstance(calls[0], PendingCompute) and isinstance(calls[0], Iterable):
        source = calls[0]
    if isinstance(source, (PendingBatch, PendingStream)):
        raise TypeError("gather() was given a batch: give it the calls, or send the batch itself: `batch >> pool`")
    if stream:
        if isinstance(source, (list, tuple)):
            return PendingStream(tuple(_checked(source)), ordered, return_exceptions)
        return PendingStream(_checked(source), ordered, return_exceptions)
    return PendingBatch(tuple(_checked(source)), return_exceptions)


def _checked(calls: Iterable[Any]) -> Iterator[PendingCompute[Any]]:
    for index, call in enumerate(calls):
        if isinstance(call, NotCalled):
            raise TypeError(f"gather(): item {index}: {_not_called(call, '>>')}")
        if not isinstance(call, PendingCompute):
            raise TypeError(
                f"gather(): item {index} is a {type(call).__name__}, not a call of a @sky.compute function"
            )
        yield one_value(call)
