"""Warnings of calls: collected in the thread of each, and sent with its outcome."""

from __future__ import annotations

import threading
import warnings
from typing import Any

from skyward.worker import raised

CallWarnings = dict[tuple[str, type[Warning], str, int], Warning]
"""The warnings of a call, one for each text, category and place."""
_collector = threading.local()
_show_installed = False
_WARNINGS_KEPT = 100  # distinct places per call; nobody reads more


def collect(into: CallWarnings | None) -> None:
    """Collect the warnings of this thread in `into` from now on; None: show them as usual."""
    _install_show()
    _collector.into = into


def _install_show() -> None:
    global _show_installed
    if _show_installed:
        return
    _show_installed = True
    show = warnings.showwarning

    def keep(message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any, **more: Any) -> None:
        into = getattr(_collector, "into", None)
        if into is None:
            show(message, category, filename, lineno, *rest, **more)
        elif len(into) < _WARNINGS_KEPT:
            # Some libraries call this themselves, with a text.
            warning = message if isinstance(message, Warning) else category.__new__(category, message)
            into.setdefault((str(message), category, filename, lineno), warning)

    warnings.showwarning = keep


def take() -> tuple[tuple[str, bytes, str, int], ...]:
    """Return, packed, what has been collected in this thread and not been taken."""
    into: CallWarnings = _collector.into
    found = pack(into)
    into.clear()
    return found


def pack(collected: CallWarnings) -> tuple[tuple[str, bytes, str, int], ...]:
    return tuple(
        (f"{raised.kind_of(warning)}: {text}", _pack_warning(warning), file, line)
        for (text, _, file, line), warning in collected.items()
    )


def _pack_warning(warning: Warning) -> bytes:
    try:
        data, buffers = raised.pack(warning)
    except raised.UnsendableError:
        return b""
    return b"" if buffers else data
