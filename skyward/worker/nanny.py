"""Dask's nanny and its worker processes, as slots of our own have them: calls run in the main thread of their process.

Dask runs a worker's event loop in the main thread and tasks in others. Here it is the other way round, so that calls
may use signals, `asyncio.get_event_loop` and what else is only for the main thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import distributed.nanny
from distributed.nanny import WorkerProcess
from distributed.threadpoolexecutor import ThreadPoolExecutor, _worker

from skyward.transfer.wire import KILL
from skyward.worker import interrupts

_LEAVE_S = 0.2
"""Seconds that the main thread has to end when its worker has closed: it is idle, or runs what is not wanted."""


class SlotNanny(distributed.nanny.Nanny):  # type: ignore[misc]
    """Keeps a worker process in a slot, and calls `on_exit` with the address of each one that has ended."""

    def __init__(self, *args: Any, on_exit: Callable[[str | None], None], **options: Any) -> None:
        super().__init__(*args, **options)
        self._on_exit = on_exit
        self.handlers[KILL] = self._kill

    async def instantiate(self) -> Any:
        distributed.nanny.WorkerProcess = SlotProcess  # the name by which a nanny makes its process
        return await super().instantiate()

    async def _kill(self) -> None:
        """Kill the worker process, which does not answer; another one is started."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)

    def _on_worker_exit_sync(self, exitcode: int) -> None:
        self._on_exit(self.worker_address)  # before the next process reads the pipes
        super()._on_worker_exit_sync(exitcode)


class SlotProcess(WorkerProcess):  # type: ignore[misc]
    """A worker process whose main thread runs calls, beside Dask's event loop in another one."""

    @classmethod
    def _run(cls, *args: Any, **options: Any) -> None:
        global _executor
        # The agent ignores it, and so would programs that a call starts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupts.wake_main_thread()
        executor = _executor = MainThreadPoolExecutor()
        failures: list[BaseException] = []

        def run() -> None:
            try:
                super(SlotProcess, cls)._run(*args, **options)
            except BaseException as exc:  # raised in the main thread
                failures.append(exc)
            executor.shutdown(wait=False)
            if not executor.has_left.wait(_LEAVE_S):
                os._exit(1 if failures else 0)  # as when Dask's main thread returns while a task still runs

        thread = threading.Thread(target=run, name="skyward-worker", daemon=True)
        thread.start()
        executor.serve()
        thread.join()
        if failures:
            raise failures[0]


class MainThreadPoolExecutor(ThreadPoolExecutor):  # type: ignore[misc]
    """Runs tasks one after another in the main thread, while that is in `serve`.

    A task that secedes keeps the main thread; until it has ended, another thread takes its place. Dask gives tasks
    their context only if the name of the executor's class has ``ThreadPoolExecutor`` in it. So has this one.
    """

    def __init__(self) -> None:
        super().__init__(1)
        self.has_left: threading.Event = threading.Event()
        self._threads.add(threading.main_thread())

    def serve(self) -> None:
        """Run tasks until `shutdown`. Called in the main thread."""
        while not self._shutdown:
            _worker(self, self._work_queue)
            if not self._shutdown:
                self._return_to_pool()
        self.has_left.set()

    def _return_to_pool(self) -> None:
        """Take the place of another thread again, as Dask's `rejoin` does, after a task that has seceded."""
        returned = threading.Event()
        with self._rejoin_lock:
            self._rejoin_list.append((threading.main_thread(), returned))
        with contextlib.suppress(RuntimeError):  # it has been shut down
            self.submit(lambda: None)
            returned.wait()

    def shutdown(self, wait: bool = True, timeout: float | None = None) -> None:
        # Not by joining threads: the main thread goes on when it has left.
        super().shutdown(wait=False)
        if wait:
            self.has_left.wait(timeout)


_executor: MainThreadPoolExecutor | None = None


def run_in_main_thread(worker: Any) -> None:
    """Let tasks of `worker`, in a `SlotProcess`, run in the main thread."""
    assert _executor is not None
    worker.executors["default"] = _executor
