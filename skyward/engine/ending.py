"""Workers that end because the engine wants them to: renewed for new modules, or running a call that was cancelled."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Mapping

from skyward.engine.calls import now
from skyward.engine.loop import Loop
from skyward.engine.roster import Roster
from skyward.engine.transport import Transport
from skyward.worker import interrupts

RESTART_S = 60.0
"""Seconds that a dead worker process has to be back, as far as broadcasts wait for it."""
_ENDING_S = interrupts.GRACE_S + 10.0
"""Seconds after which a worker that was to end because of a cancelled call has ended, or goes on.
Chosen, not measured."""
_ASK_AGAIN_S = 1.0
"""Seconds after which a worker that is to end is asked again. Chosen, not measured."""


class EndingWorkers:
    """Ends workers and interrupts chunks, and knows which workers may end for that. In the event loop."""

    def __init__(self, loop: Loop, roster: Roster, transport: Transport) -> None:
        self._loop = loop
        self._roster = roster
        self._transport = transport
        self._workers: dict[str, float] = {}  # that may end at our request, and until when
        # Those that were interrupted, oldest first: until when they may still run, and where.
        self._chunks: deque[tuple[float, str, str | None]] = deque()

    def __contains__(self, address: str) -> bool:
        """Tell whether a worker may have ended at the engine's request, and not because of the call that it ran."""
        return self._workers.get(address, 0) > now()

    def end(self, address: str) -> None:
        """Have a worker that has older versions of own modules ended, which brings a new one."""
        self._roster.placement.avoid(address, math.inf)
        self._workers[address] = now() + _ENDING_S
        self._loop.start(self._ask_to_end(address))

    async def _ask_to_end(self, address: str) -> None:
        while self._roster.alive is not None and address in self._roster.alive():
            await self._transport.end_worker(address)
            await asyncio.sleep(_ASK_AGAIN_S)

    async def renewed(self, address: str) -> str:
        """Have a worker ended, and return the address of the one that has come in its place."""
        self.end(address)
        while (found := self._roster.placement.successor(address)) is None:
            await asyncio.sleep(0.02)
        return found

    async def interrupt(self, places: Mapping[str, str | None]) -> None:
        """Take chunks off the cluster: see `Transport.interrupt`."""
        hit = await self._transport.interrupt(places)
        self._workers.update(dict.fromkeys(hit, now() + _ENDING_S))
        if hit:
            self.add_chunks(places)

    def add_chunks(self, interrupted: Mapping[str, str | None]) -> None:
        """Let the next broadcast wait until these chunks have ended: they may take their workers along."""
        began = now()
        while self._chunks and self._chunks[0][0] <= began:
            self._chunks.popleft()
        self._chunks += ((began + RESTART_S, key, address) for key, address in interrupted.items())

    async def wait_for_chunks(self) -> None:
        """Return when no interrupted chunk runs any more and the workers that had one answer."""
        here = {None, *self._roster.workers()}
        places = {key: address for until, key, address in self._chunks if until > now() and address in here}
        self._chunks.clear()
        if places:
            await self._transport.wait_ended(places, self._roster.workers)
