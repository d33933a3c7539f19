"""The engine's way to the cluster and back: chunks become Dask tasks, tasks are ended, large buffers are scattered.

Used in the event loop of the Dask client only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from skyward import interrupts, runtime
from skyward.engine.store import Store
from skyward.wire import Chunk, Outcomes

logger = logging.getLogger(__name__)


class Transport:
    """Sends chunks through one Dask client. `direct`: results are fetched from the workers that hold them."""

    def __init__(self, client: Any, store: Store, *, direct: bool) -> None:
        self.client = client
        self._store = store
        self._direct = direct
        self._scattered: dict[str, asyncio.Task[Any]] = {}

    async def arguments(self, chunk: Chunk) -> list[Any]:
        """Return the chunk and the futures of those large buffers that lie on the cluster rather than in files."""
        digests: dict[str, None] = {}
        for refs in [*(f.buffers for f in chunk.functions), *(c.buffers for c in chunk.calls)]:
            digests.update((r.digest, None) for r in refs if r.path is None)
        for digest in self._store.dropped:
            self._scattered.pop(digest, None)
        self._store.dropped.clear()
        for digest in digests:
            if digest not in self._scattered:
                # Stored before the wait, so that the next chunk waits for the same transfer.
                self._scattered[digest] = asyncio.ensure_future(self._scatter(digest))
        return [chunk, *[await self._scattered[d] for d in digests]]

    async def _scatter(self, digest: str) -> Any:
        (future,) = await self.client._scatter([self._store.data(digest)], hash=False)
        return future

    def lose(self, digests: set[str]) -> bool:
        """Forget the copies of large buffers on the cluster, and tell whether there were any; new ones are made."""
        lost = [digest for digest in digests if self._scattered.pop(digest, None) is not None]
        return bool(lost)

    async def run(self, key: str, arguments: Sequence[Any], **where: Any) -> Outcomes:
        """Run a chunk as the Dask task `key`; what Dask itself raises is passed on.

        Cancelling this leaves the task to `interrupt`.
        """
        future = self.client.submit(runtime.run_batch, *arguments, key=key, pure=False, **where)
        # Shielded, because a gather that is cut short leaves tasks that complain about it on the terminal.
        gathering = asyncio.ensure_future(self.client.gather(future, direct=self._direct, asynchronous=True))
        gathering.add_done_callback(_retrieve)
        outcomes: Outcomes = await asyncio.shield(gathering)
        return outcomes

    async def interrupt(self, keys: list[str]) -> set[str]:
        """Take tasks off the cluster: queued ones are dropped, running ones interrupted.

        Returns the addresses of workers that ran one, and that will end if it does not react.
        """
        try:
            self.client._send_to_scheduler(
                {"op": "cancel-keys", "keys": keys, "force": False, "reason": "cancelled", "msg": ""}
            )
            for key in keys:
                state = self.client.futures.pop(key, None)
                if state is not None:
                    state.cancel()
            hits = await self.client._run(interrupts.interrupt, keys, on_error="ignore")
            return {address for address, hit in hits.items() if hit}
        except Exception:  # the cluster is going away, and the tasks with it
            logger.debug("interrupt of %d tasks failed", len(keys), exc_info=True)
            return set()

    async def wait_ended(self, keys: list[str]) -> None:
        """Return when none of the tasks runs any more, interrupted or ended with its worker."""
        while any((await self.client._run(interrupts.runs_one_of, keys, on_error="ignore")).values()):
            await asyncio.sleep(0.05)

    def forget(self) -> None:
        """Let go of what was scattered."""
        self._scattered.clear()


def _retrieve(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()
