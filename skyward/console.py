"""What a pool shows on the terminal: one line when it is up, and what its calls print. A subscriber of events."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from skyward import events

if TYPE_CHECKING:
    from skyward.pool import ComputePool


class Console:
    """Writes lines, or nothing at all when `display` is ``"quiet"``. Thread-safe as `sys.stdout` is."""

    def __init__(self, display: str) -> None:
        self._quiet = display == "quiet"

    def __call__(self, event: Any) -> None:
        if not self._quiet and isinstance(event, events.LogLine):
            # One write, so that lines of several threads do not mix.
            sys.stdout.write(f"[node {event.node}] {event.line}\n")

    def ready(self, pool: ComputePool, link: str, seconds: float) -> None:
        if not self._quiet:
            sys.stderr.write(f"skyward: {pool!r} up in {seconds:.1f} s, dashboard at {link}\n")
