"""The event loop of the Dask client, and the way into it from other threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any


class Loop:
    """Runs the engine's callbacks and tasks in the thread of the Dask client's event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.asyncio_loop = loop
        self.left: BaseException | None = None  # why it is out of reach: this is a forked child
        self.tasks: set[asyncio.Task[Any]] = set()  # that have not ended
        self._thread: int | None = None
        self.call_soon(self._note_thread)

    def _note_thread(self) -> None:
        self._thread = threading.get_ident()

    # --- from any thread ------------------------------------------------------------------------------------

    @property
    def is_here(self) -> bool:
        """Whether this is the thread of the event loop."""
        return threading.get_ident() == self._thread

    def check_thread(self) -> None:
        """Raise if a wait in this thread would block the event loop."""
        if self.is_here:
            raise RuntimeError(
                "skyward's blocking calls can't be made from the thread of its event loop; "
                "make them from another thread, e.g. with asyncio.to_thread"
            )

    def call_soon(self, fn: Callable[..., None], *args: Any) -> None:
        """Call `fn` in the loop. Does not wait."""
        if self.left is None and not self.asyncio_loop.is_closed():
            self.asyncio_loop.call_soon_threadsafe(fn, *args)

    def call(self, fn: Callable[[], None], *, timeout_s: float) -> None:
        """Call `fn` in the loop and wait until it has returned; a loop that takes longer is stuck."""
        done = threading.Event()

        def run() -> None:
            try:
                fn()
            finally:
                done.set()

        self.asyncio_loop.call_soon_threadsafe(run)
        done.wait(timeout_s)

    # --- in the loop ----------------------------------------------------------------------------------------

    def start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine as a task until it ends or `cancel_tasks` is called."""
        task = self.asyncio_loop.create_task(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def cancel_tasks(self) -> None:
        for task in self.tasks:
            task.cancel()
