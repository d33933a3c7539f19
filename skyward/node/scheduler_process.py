"""The Dask scheduler, a process below the agent: how the agent starts, watches and ends it, and what runs in it.

It is forked from the parent of the workers, so that it starts fast and ends with the agent however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import Any

from skyward.node import descriptors, reach
from skyward.node.config import AgentConfig

BEAT_S = 5.0
"""Seconds between two signs of life of the scheduler's event loop."""
HANG_S = 60.0
"""Seconds without one after which the scheduler hangs. Chosen: far more than Dask needs for a large graph."""


class SchedulerProcess:
    """A Dask scheduler in a process of its own, which starts at once. For one event loop.

    Parameters
    ----------
    ended
        Called with the reason when it ends, or hangs and is killed, after it has started and before `kill`.
    has_dashboard
        Called when its dashboard is there.
    """

    def __init__(self, config: AgentConfig, *, ended: Callable[[str], None], has_dashboard: Callable[[], None]) -> None:
        import dask.config
        from distributed.process import AsyncProcess
        from distributed.utils import get_mp_context
        from tornado.ioloop import IOLoop

        self._ended = ended
        self._has_dashboard = has_dashboard
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[tuple[str, int | None]] = self._loop.create_future()
        self._is_over = False
        self._has_beaten = False
        self._pipe, self._their_pipe = get_mp_context().Pipe()
        self._loop.add_reader(self._pipe.fileno(), self._read)
        arguments = (config, dask.config.config, BEAT_S, self._their_pipe)
        self._process = AsyncProcess(IOLoop.current(), target=run, args=arguments, name="Dask scheduler")
        self._process.daemon = True
        self._process.set_exit_callback(self._exited)
        self._process.start().add_done_callback(self._launched)
        self._watch: asyncio.Task[None] | None = None

    async def started(self) -> tuple[str, int | None]:
        """Wait until it has started; return its address and the port of its HTTP server.

        Raises
        ------
        ChildProcessError
            It does not start; the message says why.
        """
        return await asyncio.shield(self._started)

    def show_dashboard(self) -> None:
        """Have it add its dashboard, unless it has."""
        with contextlib.suppress(OSError):  # it has ended
            self._pipe.send("dashboard")

    def kill(self) -> None:
        """End it, whatever state it is in. Returns at once."""
        if not self._is_over:
            self._is_over = True
            if self._watch is not None:
                self._watch.cancel()
            self._loop.remove_reader(self._pipe.fileno())
            self._pipe.close()
        self._process.kill()  # in turn after its start, which may be under way

    def _launched(self, launch: asyncio.Future[None]) -> None:
        self._their_pipe.close()
        if (error := launch.exception()) is not None:
            self._lose(reach.reason(error))
        elif not self._is_over:
            self._watch = self._loop.create_task(self._watch_beats())

    def _read(self) -> bool:
        """Take a message; return False when no more can come."""
        try:
            message = self._pipe.recv()
        except (EOFError, OSError):
            self._loop.remove_reader(self._pipe.fileno())
            return False
        self._has_beaten = True
        match message:
            case "beat":
                pass
            case "dashboard":
                self._has_dashboard()
            case ("started", address, port) if not self._started.done():
                self._started.set_result((address, port))
            case ("failed", why):
                self._lose(why)
        return True

    async def _watch_beats(self) -> None:
        # In steps: when this process was suspended, that is one of them, and what waits in the pipe is read before.
        missed = 0
        while missed * BEAT_S < HANG_S:
            self._has_beaten = False
            await asyncio.sleep(BEAT_S)
            missed = 0 if self._has_beaten else missed + 1
        self._lose(f"the event loop of the Dask scheduler has not moved for {HANG_S:g} s")

    def _exited(self, process: Any) -> None:
        while not self._is_over and self._read():  # it may have said why
            pass
        code = process.exitcode
        self._lose(f"the Dask scheduler {f'was ended by signal {-code}' if code < 0 else f'ended with status {code}'}")

    def _lose(self, why: str) -> None:
        if self._is_over:
            return
        self.kill()
        if self._started.done():
            self._ended(why)
        else:
            self._started.set_exception(ChildProcessError(f"the Dask scheduler did not start: {why}"))


def run(config: AgentConfig, options: dict[str, Any], beat_s: float, pipe: Any) -> None:
    """Run a scheduler with these options of Dask, and tell of it through `pipe`. In its process."""
    import dask.config

    from skyward.worker.preload import die_with_parent

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    descriptors.raise_limit(descriptors.SCHEDULER)
    dask.config.set(options)
    logging.getLogger("distributed").setLevel(logging.WARNING)  # the parent has imported it without our options
    asyncio.run(_run(config, beat_s, pipe))


async def _run(config: AgentConfig, beat_s: float, pipe: Any) -> None:
    show = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), _hear, pipe, show)
    beats = asyncio.create_task(_beat(pipe, beat_s))
    try:
        scheduler = await _scheduler(config)
    except Exception as exc:  # whatever keeps it from starting
        logging.getLogger(__name__).exception("the Dask scheduler did not start")
        pipe.send(("failed", reach.reason(exc)))
        sys.exit(1)
    pipe.send(("started", scheduler.address, _http_port(scheduler)))
    dashboard = asyncio.create_task(_add_dashboard(scheduler, config, show, pipe))
    await scheduler.finished()
    for task in (beats, dashboard):
        task.cancel()


def _hear(pipe: Any, show: asyncio.Event) -> None:
    try:
        pipe.recv()
    except (EOFError, OSError):
        os._exit(1)  # the agent has ended, or has no more use for it
    show.set()


async def _beat(pipe: Any, beat_s: float) -> None:
    """Send beats, but none into a pipe that fills up because the agent is suspended: the loop must not wait for it."""
    writable = select.poll()
    writable.register(pipe.fileno(), select.POLLOUT)
    while True:
        if writable.poll(0):
            pipe.send("beat")
        await asyncio.sleep(beat_s)


async def _scheduler(config: AgentConfig) -> Any:
    from distributed import Scheduler
    from distributed.versions import get_versions

    from skyward.node.tls import Credentials
    from skyward.scheduler.barrier import barrier_plugin
    from skyward.scheduler.link import LinkPlugin
    from skyward.scheduler.losses import LossesPlugin
    from skyward.scheduler.page_data import PageDataPlugin
    from skyward.scheduler.task_stream import ReportsPlugin

    class PoolScheduler(Scheduler):  # type: ignore[misc]
        async def add_client(self, comm: Any, client: str, versions: dict[str, Any]) -> None:  # noqa: ARG002
            # Packages that must be the same on both sides are pinned; Dask would also warn of all others.
            await super().add_client(comm, client, get_versions())

    return await PoolScheduler(
        host=reach.dask_host(config.host),
        port=0,
        protocol="tls",
        security=Credentials(config.ca, config.certificate, config.key).security(),
        dashboard=False,  # for now: see `_add_dashboard`
        dashboard_address="127.0.0.1:0",  # reached through the caller's tunnel only
        plugins=[
            barrier_plugin(config.pool_id),
            ReportsPlugin(),
            LossesPlugin(),
            LinkPlugin(),
            PageDataPlugin(),
            reach.meeting_plugin(),
        ],
    )


async def _add_dashboard(scheduler: Any, config: AgentConfig, show: asyncio.Event, pipe: Any) -> None:
    """Add the dashboard to the scheduler's server, late: what it imports would keep the pool waiting."""
    await show.wait()
    dashboard = await asyncio.to_thread(importlib.import_module, "distributed.dashboard.scheduler")
    if config.metrics:
        page = await asyncio.to_thread(importlib.import_module, "skyward.scheduler.page")
        page.add_page(scheduler)
    dashboard.connect(scheduler.http_application, scheduler.http_server, scheduler)
    pipe.send("dashboard")


def _http_port(scheduler: Any) -> int | None:
    port: int
    dashboard: Any = getattr(scheduler.services.get("dashboard"), "server", None)
    if getattr(dashboard, "port", None):
        port = dashboard.port
        return port
    for socket in getattr(getattr(scheduler, "http_server", None), "_sockets", {}).values():
        port = socket.getsockname()[1]
        return port
    return None
