"""A plugin for the scheduler: passes on to workers what a caller far away asks of them, and sends the answers back."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

from distributed import SchedulerPlugin
from distributed.core import Status, error_message
from distributed.protocol import Serialized, to_serialize
from distributed.protocol.compression import maybe_compress

from skyward.transfer.link import LINK, Link

_ZSTD = "zstd"  # of Dask's compressions


class LinkPlugin(SchedulerPlugin):  # type: ignore[misc]
    name = LINK

    async def start(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        scheduler.handlers[LINK] = self.serve

    async def serve(self, comm: Any) -> Status:
        """Serve a caller until the connection is closed."""
        answers: set[asyncio.Task[None]] = set()

        def hear(message: dict[str, Any], data: bytes) -> None:
            answers.add(task := asyncio.create_task(self._answer(link, message["id"], data)))
            task.add_done_callback(answers.discard)

        link = Link(comm, hear)
        try:
            await link.run()
        finally:
            for task in answers:
                task.cancel()
        return Status.dont_reply

    async def _answer(self, link: Link, number: int, data: bytes) -> None:
        message: dict[str, Any] = {"id": number}
        packed = b""
        try:
            answer = await self._ask(**pickle.loads(data)) if data else b""
        except Exception as exc:  # the worker is gone, usually: the caller is told
            message["error"] = error_message(exc)
        else:
            if isinstance(answer, Serialized):  # large buffers, and what belongs to them
                frames = [await asyncio.to_thread(maybe_compress, frame, compression=_ZSTD) for frame in answer.frames]
                message["header"] = answer.header
                message["frames"] = [(name, to_serialize(frame)) for name, frame in frames]
            elif isinstance(answer, bytes):
                packed = answer
            else:
                message["answer"] = answer
        link.send(message, packed)

    async def _ask(self, worker: str, **request: Any) -> Any:
        return await self._scheduler.proxy(msg=request, worker=worker)
