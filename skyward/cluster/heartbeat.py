"""Heartbeats: they tell the machines of a pool that the process which owns the pool is alive.

They come from a thread with its own event loop, over an SSH connection to each machine that carries nothing else: a
busy cluster loop, bulk data and slow cloud APIs can't delay them. The machine's end is in `watch`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from skyward.cluster.ssh import SSH_ERRORS, Link, NotListening
from skyward.cluster.tasks import end_tasks
from skyward.node.watch import BEAT, SOCKET
from skyward.providers.base import Login

logger = logging.getLogger(__name__)

_BEAT_S = 5.0
_STOP_S = 5.0
_ANSWER_S = 5.0
_TICK_S = 1.0


class Heartbeats:
    """The heartbeats of one pool. Its daemon thread runs while there is a machine to tell.

    `limit_s` are the seconds without a heartbeat after which a machine ends its part of the pool, `answer_s` those
    without an answer after which its agent counts as silent.
    """

    def __init__(self, limit_s: float, answer_s: float) -> None:
        self.limit_s = limit_s
        self._answer_s = answer_s
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._all: set[Heartbeat] = set()
        self._ticked_at = _now()
        self._suspended_at = -math.inf  # when this process went on, the last time that it had been suspended

    def start(self, login: Login, folder: str, silent: Callable[[], object]) -> Heartbeat:
        """Start to tell one machine, on which the pool has its files in `folder`. The caller also calls `stop`.

        `silent` is called, in the heartbeats' thread and again and again, while the agent gives no answer although the
        machine does.
        """
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=_run, args=[self._loop], name="skyward-heartbeat", daemon=True).start()
                self._ticked_at = _now()
                self._loop.call_soon_threadsafe(self._tick)
            heartbeat = Heartbeat(login, folder, self.limit_s, self._answer_s, silent)
            self._all.add(heartbeat)
            self._loop.call_soon_threadsafe(heartbeat.start)
        return heartbeat

    async def stop(self, heartbeat: Heartbeat) -> None:
        """Stop to tell one machine. To be called once for each, from any event loop."""
        assert self._loop is not None
        stopping = asyncio.run_coroutine_threadsafe(heartbeat.stop(), self._loop)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(stopping), _STOP_S)
        with self._lock:
            self._all.remove(heartbeat)
            if not self._all:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._loop = None

    @property
    def silence_s(self) -> float:
        """Seconds since any machine has heard us for certain, if that is our own fault.

        With one machine, it may be that machine's: then it is ours only if this process was suspended meanwhile.
        """
        with self._lock:
            silence_s = min((heartbeat.silence_s for heartbeat in self._all), default=0.0)
            is_late = _now() - self._ticked_at > self.limit_s / 2  # this process has gone on just now
            was_suspended = is_late or _now() - self._suspended_at < silence_s
            return silence_s if len(self._all) > 1 or was_suspended else 0.0

    def _tick(self) -> None:
        """Note when this process was suspended for long."""
        before, self._ticked_at = self._ticked_at, _now()
        if self._ticked_at - before > self.limit_s / 2:
            self._suspended_at = self._ticked_at
        if self._loop is not None:
            self._loop.call_later(_TICK_S, self._tick)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


class Heartbeat:
    """The heartbeat for one machine. Other threads may read what is public; the rest is the heartbeats' loop's."""

    def __init__(
        self, login: Login, folder: str, limit_s: float, answer_s: float, silent: Callable[[], object]
    ) -> None:
        self.period_s: float = min(_BEAT_S, limit_s / 8)
        self.error: str | None = "it is not there yet"
        """Why there is no connection for heartbeats; None while there is one."""
        self._limit_s = limit_s
        self._answer_s = answer_s
        self._silent = silent
        self._folder = folder
        self._link = Link(login)
        self._task: asyncio.Task[None] | None = None
        self._pause = self.period_s  # before the next try to connect
        self._heard_at = _now()
        self._was_answered = False  # by an agent

    def start(self) -> None:
        self._task = asyncio.create_task(self._beat())

    async def stop(self) -> None:
        assert self._task is not None
        await end_tasks([self._task])
        await self._link.close()

    def note_beat(self) -> None:
        """Note a heartbeat that was sent another way, if the machine may be there to hear it.

        After a silence of the limit it is not: its connection may not be known to be lost yet.
        """
        if self.silence_s < self._limit_s:
            self._heard_at = _now()

    @property
    def silence_s(self) -> float:
        """Seconds since the machine has heard us for certain. They also pass while this computer sleeps."""
        return _now() - self._heard_at

    async def _beat(self) -> None:
        await asyncio.sleep(random.uniform(0, self.period_s))  # many logins at once are refused by a common proxy
        while True:
            try:
                await self._beat_until_lost()
            except NotListening:
                if self._was_answered:
                    self.error = "the agent is not running any more"
                else:
                    await self._tell_first_watch()
            except Exception as exc:  # whatever it is, machines would end if heartbeats did
                self.error = str(exc) or type(exc).__name__
                logger.debug("no connection for heartbeats to %s", self._link.login, exc_info=True)
                self._pause = min(2 * self._pause, self._limit_s / 4)
            await asyncio.sleep(random.uniform(self._pause / 2, self._pause))

    async def _beat_until_lost(self) -> None:
        reader, writer = await self._link.open_socket(f"{self._folder}/{SOCKET}")
        with contextlib.closing(writer):
            while True:
                sent_at = _now()
                writer.write(b"\n")
                if not await self._answer(reader):
                    self.error = "it was lost"
                    return
                self._was_answered = True
                self._delivered(sent_at)
                await asyncio.sleep(self.period_s)

    async def _answer(self, reader: Any) -> bytes:
        """Return the agent's answer, empty when the connection is lost."""
        reading = asyncio.ensure_future(reader.read(64))
        waited_s = 0.0  # in steps, not by a clock: this process may be suspended during one
        try:
            while not (await asyncio.wait({reading}, timeout=self.period_s))[0]:
                self.error = "it gives no answer"
                waited_s += self.period_s
                if waited_s >= self._answer_s:
                    async with asyncio.timeout(_ANSWER_S):
                        await self._link.run("true")  # raises where it is the machine that gives no answer
                    self._silent()
            answer: bytes = reading.result()
            return answer
        finally:
            reading.cancel()

    async def _tell_first_watch(self) -> None:
        """Tell the watch that runs on a machine before there is an agent."""
        sent_at = _now()
        with contextlib.suppress(*SSH_ERRORS):
            if not (await self._link.run(touch(self._folder))).status:
                self._delivered(sent_at)

    def _delivered(self, sent_at: float) -> None:
        self.error = None
        self._pause = self.period_s
        self._heard_at = sent_at  # not now: this process may have been suspended in between


def touch(folder: str) -> str:
    """Return the shell command that is a heartbeat for the watch that runs before there is an agent."""
    return f": > {folder}/{BEAT}"


def _now() -> float:
    """Return seconds on a clock that goes on while the computer sleeps; macOS has that as CLOCK_MONOTONIC."""
    clock: Any = getattr(time, "CLOCK_BOOTTIME", None)
    return time.clock_gettime(time.CLOCK_MONOTONIC if clock is None else clock)
