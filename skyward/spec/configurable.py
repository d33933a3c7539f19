"""The mark of options that were not given: what is configured is meant then. Small, as ``import skyward`` loads it."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


class Configurable:
    """Stands for an option that was not given: the configuration's value, else `value`."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value: Any = value

    def __repr__(self) -> str:
        return f"<configured, else {self.value!r}>"


def configurable(value: T) -> T:
    """Return what to give an argument as its default, which is `value` unless something else is configured."""
    return Configurable(value)  # type: ignore[return-value]  # `config.Settings.fill` puts a value in its place
