"""A node's part of a Dask cluster: the scheduler, while the node has it, and a worker for each slot."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from skyward.node import descriptors, reach
from skyward.node.config import AgentConfig, NodeSpec
from skyward.node.scheduler_process import SchedulerProcess
from skyward.node.teardown import is_ending
from skyward.node.worker_slot import Caller, WorkerSlot
from skyward.worker import warm_parent

logger = logging.getLogger(__name__)

_SHORT = 80
"""Length of a folder's path from which on a socket in it would have too long a name: unix(7) allows 108, macOS 104."""


def start_forkserver(config: AgentConfig) -> None:
    """Start the warm parent of scheduler and workers now, so that its imports run beside ours."""
    _raise_limit(config.nodes)  # before it has a copy of it
    import multiprocessing
    from multiprocessing import forkserver

    if len(config.folder) < _SHORT:
        # Otherwise its socket lies in a separate folder, which stays behind when this process is killed.
        multiprocessing.current_process()._config["tempdir"] = config.folder  # type: ignore[attr-defined]
    context = multiprocessing.get_context("forkserver")
    # What each child imports: for itself, and with the agent, its main module. That has its name in no command line but
    # its own, by which it is known.
    preload = ["skyward.node.adoption", "distributed.worker", "skyward.worker.preload"]
    preload += ["skyward.node.dask_processes", "skyward.node.metrics", "skyward.node.relay", "skyward.node.watch"]
    if config.preload:
        os.environ[warm_parent.VARIABLE] = " ".join(config.preload)
        preload.append("skyward.node.image_modules")
    context.set_forkserver_preload(preload)
    forkserver.ensure_running()


def _raise_limit(nodes: Iterable[NodeSpec]) -> str:
    return descriptors.raise_limit(descriptors.AGENT_PER_SLOT * sum(len(node.environments) for node in nodes))


class DaskProcesses:
    """The Dask processes of an agent's nodes. For one event loop.

    Of `start_scheduler` and `join` the latest counts: it ends what an earlier one has started, or still starts.
    """

    def __init__(self, config: AgentConfig, caller: Caller) -> None:
        self._config = config
        self._caller = caller
        self._nodes: dict[int, NodeSpec] = {}
        self._slots: dict[tuple[int, int], WorkerSlot] = {}
        self._proven: set[tuple[int, int]] = set()  # slots in which a worker has come up
        self._wanted: str | None = ""  # address of the scheduler to join; None: it is to start here
        self._address = ""  # of the scheduler that the workers join now
        self._imports: asyncio.Task[str] | None = None  # the image's modules; returns what went wrong
        self._change: asyncio.Task[None] | None = None  # from the earlier scheduler to the one that is wanted
        self._scheduler: SchedulerProcess | None = None
        self._security: Any = None
        self._door: asyncio.Server | None = None  # for other nodes, which try whether they reach this one

    def configure(self) -> None:
        """Find the node's own address and set Dask's options.

        Raises
        ------
        UnreachableError
            None of the host's addresses is in the networks asked for.
        """
        import dask
        import distributed.utils

        # Dask would replace this list, which counts again when the parent of the workers has to be started again.
        distributed.utils._forkserver_preload_set = True
        host = reach.own_address(self._config.networks, self._config.host)
        config = self._config = replace(self._config, host=host)
        dask.config.set(
            {
                "temporary-directory": config.folder,
                "distributed.worker.multiprocessing-method": "forkserver",
                # Tasks may start processes of their own, as torch's DataLoader does; daemons may not.
                "distributed.worker.daemon": False,
                # A call may hold the interpreter lock for hours; then its worker sends no heartbeats. The end of a
                # worker or its machine is seen without them: by its connection, its nanny, or the machine's agent.
                "distributed.scheduler.worker-ttl": None,
                # Chunks for workers that the caller can't reach itself go through the scheduler.
                "distributed.scheduler.reuse-broadcast-comm": True,
                # Tasks may hold the interpreter lock for long; that alone is no reason for a warning.
                "distributed.admin.tick.limit": "1h",
                # What looks in often takes the interpreter lock, and time, from tasks.
                "distributed.admin.tick.interval": "1s",
                "distributed.worker.profile.interval": "50ms",
                # We measure GPUs ourselves. Dask's monitor ends a worker at its start if CUDA_VISIBLE_DEVICES names
                # a GPU that is not there, as after `sky.Local(gpus=...)`, and asks of partitions what NVML can't say.
                "distributed.diagnostics.nvml": False,
                "distributed.worker.memory.target": False,
                "distributed.worker.memory.spill": False,
                "distributed.worker.memory.pause": False,
                "distributed.worker.memory.terminate": False,
                "distributed.logging": {"distributed": "warning"},
            }
        )

    def start(self) -> None:
        """Start scheduler and workers, as far as the configuration says where the scheduler is."""
        from skyward.node.tls import Credentials

        config = self._config
        self._security = Credentials(config.ca, config.certificate, config.key).security()
        self._nodes = {node.node: node for node in config.nodes}
        self._raise_limit(*config.nodes)
        if config.preload:
            self._imports = asyncio.get_running_loop().create_task(self._import())
        if config.scheduler is None:
            self.start_scheduler()
        elif config.scheduler:
            self.join(config.scheduler)

    def add(self, node: NodeSpec) -> None:
        self._nodes[node.node] = node
        self._raise_limit(node)
        if self._address:
            self._start_slots(node)

    def _raise_limit(self, *new: NodeSpec) -> None:
        if problem := _raise_limit(new):
            self._caller.tell("warning", text=f"the agent {problem}")

    async def remove(self, nodes: Sequence[int]) -> None:
        for node in nodes:
            self._nodes.pop(node, None)
        gone = {place: slot for place, slot in self._slots.items() if place[0] in nodes}
        await asyncio.gather(*(slot.end() for slot in gone.values()))
        for place in gone:
            self._slots.pop(place, None)
            self._proven.discard(place)

    def start_scheduler(self) -> None:
        """Start a scheduler here, in place of the present one, wherever that is, and have the workers join it."""
        self._switch_scheduler(None)

    def join(self, scheduler: str) -> None:
        """Have the workers join the scheduler at this address, unless it is the present one. Empty: have none."""
        if scheduler != self._wanted:
            self._switch_scheduler(scheduler)

    def _switch_scheduler(self, scheduler: str | None) -> None:
        self._wanted = scheduler
        if self._change is not None:
            self._change.cancel()
        self._change = asyncio.get_running_loop().create_task(self._switch_to(scheduler))

    async def _switch_to(self, scheduler: str | None) -> None:
        """Leave the present scheduler for another: see `_wanted`. A later change cancels this."""
        try:
            await self._leave()
            if self._imports is not None and (error := await asyncio.shield(self._imports)):
                self._caller.fail(error)
                return
            if scheduler is None:
                scheduler = await self._start_scheduler()
            elif scheduler:
                node = self._config.nodes[0].node
                self._door = await reach.meet(scheduler, node, self._config.host, self._security)
            if scheduler:
                self._start_workers(scheduler)
        except (reach.UnreachableError, ChildProcessError) as exc:
            self._fail(str(exc), scheduler)
        except Exception as exc:  # whatever keeps a scheduler from starting; the caller is told
            logger.exception("no scheduler")
            self._fail(reach.reason(exc), scheduler)

    def _fail(self, error: str, scheduler: str | None) -> None:
        self._wanted = ""
        self._caller.fail(error, address=scheduler)

    async def _leave(self) -> None:
        """End the workers, the scheduler that is here, and what other nodes have met."""
        self._address = ""
        if self._scheduler is not None:
            self._scheduler.kill()
            self._scheduler = None
        if self._door is not None:
            self._door.close()
            self._door = None
        await asyncio.gather(*(slot.end(kill=True) for slot in self._slots.values()))
        self._slots.clear()

    async def _start_scheduler(self) -> str:
        def has_dashboard() -> None:
            self._caller.tell("dashboard")

        process = self._scheduler = SchedulerProcess(
            self._config, ended=self._scheduler_ended, has_dashboard=has_dashboard
        )
        address, port = await process.started()
        self._wanted = address
        self._caller.tell("scheduler", address=address, dashboard=port)
        return address

    def _scheduler_ended(self, why: str) -> None:
        if is_ending.is_set():
            return
        self._switch_scheduler("")
        self._caller.tell("scheduler-ended", why=why)

    async def _import(self) -> str:
        error, warnings = await asyncio.to_thread(warm_parent.outcome)
        for text in warnings:
            self._caller.tell("warning", text=text)
        return error

    def _start_workers(self, scheduler: str) -> None:
        self._address = scheduler
        for node in self._nodes.values():
            self._start_slots(node)

    def _start_slots(self, node: NodeSpec) -> None:
        for number in range(len(node.environments)):
            place = node.node, number
            self._slots[place] = WorkerSlot(
                node,
                number,
                self._address,
                config=self._config,
                security=self._security,
                caller=self._caller,
                is_new=place not in self._proven,
                came_up=partial(self._came_up, place),
            )

    def _came_up(self, place: tuple[int, int]) -> None:
        self._proven.add(place)
        if self._scheduler is not None:
            self._scheduler.show_dashboard()
