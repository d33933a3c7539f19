"""What a forked child has of its parent's pools: it may not use them, and must not end them.

A child has one thread only: locks that other threads held stay locked in it, and nothing serves the event loop.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Protocol


class Forkable(Protocol):
    """What belongs to the process that has made it."""

    def forked(self) -> None:
        """Make this copy harmless. Called in the child, whose other threads are gone: takes no lock."""


_known: weakref.WeakSet[Forkable] = weakref.WeakSet()


def tell(what: Forkable) -> None:
    """Call `forked` of an object in each child that this process forks from now on."""
    _known.add(what)


def in_child(function: Callable[[], None]) -> Callable[[], None]:
    """Decorate a function to be called in each child that this process forks, and in theirs."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)
    return function


@in_child
def _forked() -> None:
    for what in list(_known):
        what.forked()
    _known.clear()
