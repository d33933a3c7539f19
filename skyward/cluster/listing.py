"""Ask a cloud which machines of a pool it still has: once for all nodes that ask, and in a separate thread."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Sequence

from skyward.providers.base import Machine

logger = logging.getLogger(__name__)

LIMIT_S = 30.0
"""Seconds to wait for a cloud's answer; then the machine is taken to be there. Chosen, not measured."""


class Listing:
    """Answers whether machines exist. Used in one event loop.

    `gone` returns the ids of those of its machines that don't exist any more. It may block, and has one call at a time:
    what is asked meanwhile goes into the next one.
    """

    def __init__(self, gone: Callable[[Sequence[Machine]], Collection[str]]) -> None:
        self._gone = gone
        self._waiting: dict[Machine, asyncio.Future[bool]] = {}
        self._is_asking = False

    async def has(self, machine: Machine) -> bool:
        """Tell whether a machine exists. True as well where the cloud does not say so in time."""
        answer = self._waiting.setdefault(machine, asyncio.get_running_loop().create_future())
        if not self._is_asking:
            self._ask(asyncio.get_running_loop())
        try:
            async with asyncio.timeout(LIMIT_S):
                return await asyncio.shield(answer)
        except TimeoutError:
            return True

    def _ask(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting, self._waiting = self._waiting, {}
        self._is_asking = bool(waiting)
        if not waiting:
            return

        def answer(gone: Collection[str]) -> None:
            for machine, future in waiting.items():
                future.set_result(machine.id not in gone)
            self._ask(loop)

        def ask() -> None:
            gone: Collection[str] = ()
            try:
                gone = self._gone(list(waiting))
            except Exception:  # a fault of ours or of an SDK; machines count as there, and are asked for again
                logger.exception("the listing of machines failed")
            try:
                loop.call_soon_threadsafe(answer, gone)
            except RuntimeError:
                logger.debug("the pool has ended before its machines were listed")

        # Not in the loop's executor: what else waits for a cloud there would delay this, and this everything else.
        threading.Thread(target=ask, name="skyward-listing", daemon=True).start()
