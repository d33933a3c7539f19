"""What a forked child has of its parent's pools: it may not use them, and must not end them.

A child has one thread only: locks that other threads held stay locked in it, and nothing serves the event loop.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    """What belongs to the process that has made it."""

    def forked(self) -> None:
        """Make this copy harmless. Called in the child, whose other threads are gone: takes no lock."""


_known: weakref.WeakSet[Forkable] = weakref.WeakSet()


def tell(what: Forkable) -> None:
    """Call `forked` of an object in each child that this process forks from now on."""
    _known.add(what)


def _forked() -> None:
    for what in list(_known):
        what.forked()
    _known.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
