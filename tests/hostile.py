"""User code that raises where nobody expects it: exceptions of all kinds, and objects that raise them."""

from __future__ import annotations

import asyncio
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FrozenError(Exception):
    code: int
    text: str = "frozen"


class KeywordError(Exception):
    def __init__(self, a: int, *, b: int) -> None:
        super().__init__(f"{a} and {b}")
        self.b = b


class OwnBaseException(BaseException):
    pass


class LockedError(Exception):
    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class FalseError(Exception):
    def __bool__(self) -> bool:
        return False


class SpeechlessError(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt


class ExitingError(Exception):
    def __reduce__(self) -> Any:
        raise SystemExit(4)


class NumberError(Exception):
    def __reduce__(self) -> Any:
        return int, ("7",)


class HereError(Exception):
    """Unpickles on the worker and not at the caller."""

    def __reduce__(self) -> Any:
        return _here, (os.getpid(),)


def _here(worker: int) -> Exception:
    if os.getpid() != worker:
        raise SystemExit(5)
    return HereError()


class VersionWarning(UserWarning):
    """As scikit-learn's `InconsistentVersionWarning`: made from keywords, and its text from its attributes."""

    def __init__(self, *, old: str, new: str) -> None:
        self.old, self.new = old, new

    def __str__(self) -> str:
        return f"from {self.old}, this is {self.new}"


class LockedWarning(UserWarning):
    def __init__(self) -> None:
        super().__init__("warns with a lock")
        self.lock = threading.Lock()


def _recursion() -> RecursionError:
    def forever(n: int) -> int:
        return forever(n + 1)

    try:
        forever(0)
    except RecursionError as exc:
        return exc
    raise AssertionError


EXCEPTIONS: dict[str, Callable[[], BaseException]] = {
    "ValueError": lambda: ValueError("x"),
    "SystemExit": lambda: SystemExit(3),
    "SystemExit of an object": lambda: SystemExit(threading.Lock()),  # type: ignore[arg-type]
    "KeyboardInterrupt": KeyboardInterrupt,
    "GeneratorExit": GeneratorExit,
    "StopIteration": lambda: StopIteration(1),
    "CancelledError": asyncio.CancelledError,
    "RecursionError": _recursion,
    "group": lambda: BaseExceptionGroup("several", [ValueError(1), KeyboardInterrupt()]),
    "warning": lambda: VersionWarning(old="1", new="2"),
    "frozen": lambda: FrozenError(3),
    "keywords": lambda: KeywordError(1, b=2),
    "own BaseException": OwnBaseException,
    "unpicklable": LockedError,
    "false": FalseError,
    "speechless": SpeechlessError,
    "exits when pickled": ExitingError,
    "pickles as a number": NumberError,
    "exits when unpickled at the caller": HereError,
}


class Trap:
    """Raises an exception, by its name, in one of its methods."""

    def __init__(self, name: str, method: str) -> None:
        self.name, self.method = name, method

    def _spring(self, method: str) -> None:
        if method == self.method:
            raise EXCEPTIONS[self.name]()

    def __getstate__(self) -> dict[str, str]:
        self._spring("pickle")
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__.update(state)
        self._spring("unpickle")

    def __del__(self) -> None:
        self._spring("delete")


def raise_one(name: str) -> None:
    raise EXCEPTIONS[name]()


def make_trap(name: str, method: str) -> Trap:
    return Trap(name, method)


def take(value: object) -> bool:
    return value is not None


def warn(name: str) -> int:
    exc = EXCEPTIONS[name]()
    warnings.warn(exc if isinstance(exc, Warning) else name, stacklevel=1)
    warnings.warn(LockedWarning(), stacklevel=1)
    warnings.warn(VersionWarning(old="1.2", new="1.9"), stacklevel=1)
    return 1


def iterate(calls: list[Any], name: str) -> Iterator[Any]:
    yield from calls
    raise EXCEPTIONS[name]()
