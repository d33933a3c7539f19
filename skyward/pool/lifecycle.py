"""The life of a pool: it is started, and ended by its user or by a limit, and may be started again."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from skyward import forks
from skyward.errors import NoActivePoolError, PoolError, SkywardError, VolumeError

if TYPE_CHECKING:
    from distributed import Client

    from skyward import events
    from skyward.cluster.base import SkyCluster
    from skyward.console.output import Output
    from skyward.providers import Resolved
    from skyward.session.session import Session
    from skyward.spec.pool import PoolSpec


class Lifecycle:
    """Has at most one session at a time, and what is asked for of the last one. For all threads."""

    def __init__(self, spec: PoolSpec, provider: Resolved, callbacks: Iterable[events.Callback]) -> None:
        self._spec = spec
        self._provider = provider
        self._callbacks = list(callbacks)
        self._lock = threading.RLock()
        self._session: Session | None = None
        self._ended: BaseException | None = None
        self._last_cost = 0.0
        self._loss: VolumeError | None = None  # of which the user has not been told by an exception
        self._default: Client | None = None  # the client that is Dask's default
        self.output: Output | None = None  # of the last session

    def start(self) -> None:
        """Bring everything up.

        Raises
        ------
        PoolError
            It is up, or starts, already.
        """
        from skyward.session.session import Session

        with self._lock:
            if self._session is not None:
                raise PoolError("this pool is already active; create another ComputePool for a second pool")
            self._ended = self._loss = None
            self._last_cost = 0.0
            session = Session(self._spec, self._provider, self._callbacks, lambda reason: self._limit(session, reason))
            self._session, self.output = session, session.output
            forks.tell(self)
            try:
                session.start()
            except BaseException as exc:
                self._session = None
                try:
                    session.stop(PoolError("the pool did not start"))
                finally:
                    self._last_cost = session.cost
                if isinstance(exc, SkywardError):  # its message says it all; the way it came is ours and long
                    raise exc.with_traceback(None) from exc.__cause__
                raise

    def end(self) -> None:
        """End everything; a start in another thread fails soon. May be called again.

        Raises
        ------
        VolumeError
            What was written to a volume could not be sent. Everything has ended all the same.
        """
        if (session := self._session) is not None:
            session.abandon()
        with self._lock:
            self._stop(None)
            if self._loss is not None:
                loss, self._loss = self._loss, None
                raise loss

    async def start_async(self) -> None:
        """Do what `start` does, in a thread; end everything if the task is cancelled."""
        import asyncio

        cancelled = threading.Event()

        def start() -> None:
            self.start()
            if cancelled.is_set():  # before there was anything to end
                self.end()

        try:
            await asyncio.to_thread(start)
        except asyncio.CancelledError:
            cancelled.set()
            await self.end_async()
            raise

    async def end_async(self) -> None:
        """Do what `end` does, in a thread, even if the task is cancelled."""
        import asyncio

        # Shielded: a task that is cancelled must not leave machines behind.
        await asyncio.shield(asyncio.to_thread(self.end))

    def _limit(self, session: Session, reason: BaseException) -> None:
        """End a session that has reached a limit, unless its user has ended it before."""
        with self._lock:
            if self._session is session:
                self._stop(reason)

    def _stop(self, reason: BaseException | None) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        self._ended = reason
        try:
            session.stop(reason or PoolError("the pool is closed"))
        finally:
            self._last_cost = session.cost
            self._loss = session.loss

    def forked(self) -> None:
        """Leave the pool to the parent of this process, which was forked from it."""
        self._lock = threading.RLock()
        session, self._session = self._session, None
        if session is not None:
            self._ended = PoolError(
                f"this pool belongs to process {os.getppid()}, from which this process was forked. Use it there, or "
                "start this process with multiprocessing's method 'spawn' and open a pool in it."
            )
            session.forked(self._ended)
        self.restore_default()

    def make_default(self) -> None:
        """Make the session's client Dask's default client here."""
        from skyward.session.client import make_default

        self._default = self.session.client
        if self._default is not None:
            make_default(self._default)

    def restore_default(self) -> None:
        """End `make_default`."""
        from skyward.session.client import restore_default

        default, self._default = self._default, None
        if default is not None:
            restore_default(default)

    def listen(self, callback: events.Callback) -> None:
        """Let `callback` hear of every event from now on."""
        self._callbacks.append(callback)
        if (session := self._session) is not None:
            session.listen(callback)

    @property
    def is_active(self) -> bool:
        return self._session is not None

    @property
    def session(self) -> Session:
        """The session.

        Raises
        ------
        NoActivePoolError
            There is none. Another error, where that is why it has ended.
        """
        if (session := self._session) is not None:
            return session
        if self._ended is not None:
            raise self._ended
        raise NoActivePoolError(
            "this pool is not active: its machines exist only inside its `with` block.\n"
            "    with pool:\n"
            "        result = fn(...) >> pool"
        )

    @property
    def cluster(self) -> SkyCluster | None:
        """The cluster of the session, if it has got so far."""
        session = self._session
        return session.cluster if session is not None else None

    @property
    def cost(self) -> float:
        """What the session has cost so far, or the last one in all, in USD."""
        session = self._session
        return session.cost if session is not None else self._last_cost
