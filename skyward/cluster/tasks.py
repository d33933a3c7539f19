"""The end of asyncio tasks that do not end at the first request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

_CANCEL_AGAIN_S = 1.0


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and wait for their end.

    Each is cancelled until it ends: `asyncio.wait_for`, with which asyncssh connects, swallows a cancellation in Python
    3.11 that comes together with what it waits for (cpython issue 86296).
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_CANCEL_AGAIN_S)
