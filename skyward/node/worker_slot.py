"""A slot of a node: a nanny with a worker process, which is started again for as long as the slot is wanted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from skyward.node import reach
from skyward.node.config import AgentConfig, NodeSpec
from skyward.worker import buffer_files, capture

KEPT_LINES = 500
"""Lines of its log that an agent sends with a failure: its folder may be gone when they are asked for."""
_ATTEMPTS = 3
"""How often a worker process may fail to come up at first. Chosen, not measured: more than one is a rare race, not a
fault."""
_AGAIN_S = 1.0
_CLOSE_S = 2.0
"""Seconds that a worker has to close before it is killed."""
_LOOK_S = 0.02
_STOPPED_LOOK_S, _STOPPED_LOOKS = 5.0, 6
"""A worker process that is stopped at so many looks in a row, so many seconds apart, is killed. Chosen, not measured: a
debugger stops it in another way."""


class Caller(Protocol):
    """The agent, as what it runs sees it."""

    def tell(self, event: str, *, keep: bool = True, **facts: Any) -> None:
        """Tell the pool of an event."""

    def fail(self, error: str, **facts: Any) -> None:
        """Tell the pool that the node can't take part."""


class WorkerSlot:
    """Keeps a worker in a slot from now on, until `end`: its nanny restarts it, this restarts the nanny.

    Parameters
    ----------
    scheduler
        Its address. While nothing answers there, the slot waits.
    is_new
        Whether no worker has come up in this slot yet; then the node fails after some attempts.
    came_up
        Called when a worker has come up.
    """

    def __init__(
        self,
        node: NodeSpec,
        number: int,
        scheduler: str,
        *,
        config: AgentConfig,
        security: Any,
        caller: Caller,
        is_new: bool,
        came_up: Callable[[], None],
    ) -> None:
        self._node = node
        self._number = number
        self._name = f"{node.node}-{number}"
        self._scheduler = scheduler
        self._config = config
        self._security = security
        self._caller = caller
        self._is_new = is_new
        self._came_up = came_up
        self._grace_s = 0.0
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def end(self, *, kill: bool = False) -> None:
        """End the worker; `kill`: at once, with what it runs. Return when it has ended."""
        if not self._task.cancelling():
            self._grace_s = 0.0 if kill else _CLOSE_S
            self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        path = f"{self._config.folder}/output-{uuid.uuid4().hex}"
        with capture.pipes(path) as output:

            def exited(address: str | None) -> None:
                self._caller.tell("exited", address=address, output=_last_lines(self._node.node, output))

            failures = 0
            while True:
                error: Exception | None = None
                try:
                    async with self._started(self._nanny({capture.VARIABLE: path}, exited)) as nanny:
                        self._is_new, failures = False, 0
                        self._came_up()
                        self._caller.tell(
                            "worker",
                            node=self._node.node,
                            slot=self._number,
                            address=nanny.worker_address,
                            pid=nanny.pid,
                        )
                        await self._until_finished(nanny)
                except Exception as exc:  # whatever keeps a process from starting, its own death at once included
                    error = exc
                if await self._waited_for_scheduler() or error is None:
                    continue
                failures += 1
                if failures >= _ATTEMPTS and self._is_new:
                    self._caller.fail(f"worker {self._name} did not start: {reach.reason(error)}")
                    return
                await asyncio.sleep(0 if failures < _ATTEMPTS else _AGAIN_S)

    async def _until_finished(self, nanny: Any) -> None:
        watching = asyncio.create_task(kill_if_stopped(lambda: nanny.pid, self._stopped))
        try:
            await nanny.finished()
        finally:
            watching.cancel()

    def _stopped(self) -> None:
        looks = f"{_STOPPED_LOOKS * _STOPPED_LOOK_S:g} s"
        self._caller.tell("warning", text=f"worker {self._name} has been stopped (SIGSTOP) for {looks}: it is killed")

    async def _waited_for_scheduler(self) -> bool:
        """Return when the scheduler answers, and whether it did not at first: then a failure is not the worker's."""
        waited = False
        while not await reach.answers(self._scheduler, self._security):
            waited = True
            await asyncio.sleep(_AGAIN_S)
        return waited

    @contextlib.asynccontextmanager
    async def _started(self, nanny: Any) -> AsyncIterator[Any]:
        """Have a nanny and its worker process inside the block."""
        starting = asyncio.ensure_future(nanny.start())
        try:
            yield await asyncio.shield(starting)
        finally:
            closing = asyncio.ensure_future(nanny.close(timeout=_CLOSE_S))
            await asyncio.wait([closing], timeout=self._grace_s)
            while not closing.done():  # it waits for a start that is under way, too
                if nanny.pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(nanny.pid, signal.SIGKILL)
                await asyncio.wait([closing], timeout=_LOOK_S)
            await asyncio.gather(starting, closing, return_exceptions=True)

    def _nanny(self, environment: dict[str, str], exited: Callable[[str | None], None]) -> Any:
        from skyward.worker.nanny import SlotNanny

        return SlotNanny(
            self._scheduler,
            on_exit=exited,
            nthreads=1,
            name=self._name,
            host=reach.dask_host(self._config.host),
            security=self._security,
            protocol="tls",
            env={
                **self._node.environments[self._number],
                buffer_files.VARIABLE: self._config.environment.get(
                    buffer_files.VARIABLE, f"{self._config.folder}/buffer-files"
                ),
                **environment,
                "SKYWARD_NODE": str(self._node.node),
                "SKYWARD_SLOT": str(self._number),
            },
            resources=self._node.resources[self._number],
            memory_limit=0,
            local_directory=self._config.folder,
            preload=["skyward.worker.preload"],
            dashboard=False,
            dashboard_address="127.0.0.1:0",  # its HTTP server has no TLS
        )


async def kill_if_stopped(
    pid: Callable[[], int], killed: Callable[[], None], look_s: float = _STOPPED_LOOK_S
) -> None:
    """Kill a process that stays stopped, as by SIGSTOP: it runs nothing and holds what it has. Until cancelled."""
    import psutil

    looks = 0
    while True:
        await asyncio.sleep(look_s)
        try:
            process = psutil.Process(pid())
            looks = looks + 1 if process.status() == psutil.STATUS_STOPPED else 0
            if looks == _STOPPED_LOOKS:
                process.kill()
                killed()
        except psutil.Error:  # it has ended
            looks = 0


def _last_lines(node: int, output: capture.Reader) -> dict[str, Any]:
    """Return what a worker process that has ended has printed and not sent, in the form in which workers send it."""
    now = time.time()
    lines = [(now, *line) for line in (*output.read(), *output.rest())][-KEPT_LINES:]
    return {"node": node, "process": uuid.uuid4().hex, "first": 0, "lines": lines}
