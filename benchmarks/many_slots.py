"""What a call costs on pools of 10, 100 and 1,000 slots: CPU time of the caller, the Dask scheduler and the workers.

Usage: python benchmarks/many_slots.py [--calls 100000] [--call-ms 1] [--slots 10,100,1000] [--direct]

Scheduler, Dask client and engine are as in a pool on machines. Workers are real Dask workers with skyward's handlers,
but hundreds share a process, so that 1,000 of them fit on one computer. Calls return at once and say that they took
`--call-ms`, so chunks are as large as they would be. No TLS.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks.*, where processes are spawned

import dask
import distributed.scheduler
import psutil
from distributed import Client, Scheduler, Worker

from skyward.engine import Call, Engine, dispatcher, sent_chunks
from skyward.engine.calls import make_chunk
from skyward.engine.run import stream
from skyward.node import descriptors
from skyward.scheduler.link import LinkPlugin
from skyward.scheduler.losses import LossesPlugin
from skyward.scheduler.task_stream import ReportsPlugin
from skyward.transfer.wire import Chunk, Slot
from skyward.worker import handlers, runtime

PROCESSES = 4
SLOTS_PER_NODE = 10
OPTIONS = {
    # As on machines; and nothing that hundreds of workers in one process would do again and again.
    "distributed.scheduler.worker-ttl": None,
    "distributed.scheduler.reuse-broadcast-comm": True,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.tick.limit": "1h",
    "distributed.admin.system-monitor.interval": "1h",
    "distributed.worker.profile.enabled": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.diagnostics.nvml": False,
    "distributed.comm.timeouts.connect": "120s",
}


class PoolClient(Client):  # type: ignore[misc]
    """A client of a scheduler that the engine's requests go through."""

    async def connect_scheduler(self) -> Any:
        return await self.rpc.connect(self.scheduler.addr)


def quiet() -> None:
    """Set Dask's options in this process and keep it from logging."""
    dask.config.set(OPTIONS)
    logging.getLogger("distributed").setLevel(logging.CRITICAL + 1)  # at the end, connections break
    warnings.simplefilter("ignore")  # hundreds of workers make their folders at once, which takes long


def run_scheduler(pipe: Connection) -> None:
    descriptors.raise_limit(descriptors.SCHEDULER)
    quiet()
    distributed.scheduler.heartbeat_interval = lambda _: 60.0  # their cost is one of time, not of calls

    async def run() -> None:
        plugins = [LinkPlugin(), LossesPlugin(), ReportsPlugin()]
        async with Scheduler(host="127.0.0.1", port=0, dashboard=False, plugins=plugins) as scheduler:
            pipe.send(scheduler.address)
            await asyncio.to_thread(pipe.recv)

    asyncio.run(run())


def run_workers(pipe: Connection, scheduler: str, count: int, call_s: float) -> None:
    descriptors.raise_limit(count * descriptors.AGENT_PER_SLOT)
    quiet()
    run_call = runtime._run_call
    runtime._run_call = lambda *arguments: run_call(*arguments)._replace(seconds=call_s)
    handlers._change_threads = lambda *_: None  # which is for one worker in a process, and matters to tasks only

    async def run() -> None:
        options = {"nthreads": 1, "host": "127.0.0.1", "memory_limit": 0, "dashboard": False}
        workers = [Worker(scheduler, **options) for _ in range(count)]
        for worker in workers:
            await worker
            handlers.install(worker)
        pipe.send([worker.address for worker in workers])
        await asyncio.to_thread(pipe.recv)
        os._exit(0)

    asyncio.run(run())


@dataclass(frozen=True)
class Site:
    """A running scheduler with its workers."""

    scheduler: str
    slots: Sequence[Slot]
    processes: dict[str, list[psutil.Process]]  # by what runs there

    def seconds(self) -> dict[str, float]:
        """Return the CPU time that each part has used."""
        return {
            part: sum(sum(process.cpu_times()[:2]) for process in processes)
            for part, processes in self.processes.items()
        }


@contextmanager
def site(count: int, call_s: float) -> Iterator[Site]:
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []  # processes end when theirs is closed
    running: list[Any] = []

    def start(target: Any, *arguments: Any) -> Connection:
        mine, theirs = context.Pipe()
        running.append(process := context.Process(target=target, args=(theirs, *arguments), daemon=True))
        process.start()
        pipes.append(mine)
        return mine

    try:
        address = start(run_scheduler).recv()
        shares = [len(range(i, count, PROCESSES)) for i in range(min(PROCESSES, count))]
        found = [a for pipe in [start(run_workers, address, share, call_s) for share in shares] for a in pipe.recv()]
        slots = [Slot(a, *divmod(number, SLOTS_PER_NODE)) for number, a in enumerate(found)]
        parts = [psutil.Process(process.pid) for process in running]
        yield Site(address, slots, {"caller": [psutil.Process()], "scheduler": parts[:1], "workers": parts[1:]})
    finally:
        for process in reversed(running):
            process.kill()
            process.join()


def measure(where: Site, calls: int, *, direct: bool) -> dict[str, float]:
    """Run the calls; return microseconds by part and call, and how many chunks there were."""
    chunks = 0

    def count_chunk(*arguments: Any, **options: Any) -> Chunk:
        nonlocal chunks
        chunks += 1
        return make_chunk(*arguments, **options)

    with PoolClient(where.scheduler, set_as_default=False, connection_limit=16_384) as client:
        engine = Engine(
            client, lambda: where.slots, pool_id="simulated", direct=direct,
            alive=lambda: [slot.address for slot in where.slots],
        )  # fmt: skip
        with closing(engine):
            engine.wait_ready()
            for round_ in range(2):  # the first one connects, and measures how long calls take
                count = calls if round_ else 10 * len(where.slots)
                before, began = where.seconds(), time.perf_counter()
                chunks = 0
                with mock.patch.object(dispatcher, "make_chunk", count_chunk):
                    ended = sum(1 for _ in stream(engine, (Call(divmod, (i, 7)) for i in range(count)), ordered=False))
                took, after = time.perf_counter() - began, where.seconds()
                assert ended == count
    costs = {part: (after[part] - before[part]) / calls * 1e6 for part in before}
    return costs | {"chunks": chunks, "seconds": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--call-ms", type=float, default=1.0)
    parser.add_argument("--slots", default="10,100,1000")
    parser.add_argument("--direct", action="store_true", help="reach workers without the scheduler")
    options = parser.parse_args()
    quiet()
    sent_chunks._PLACEHOLDER_S = 600.0  # workers that share a few cores answer late
    what = f"{options.calls:,} calls of {options.call_ms:g} ms"
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {what}\n")
    print("| slots | chunks | caller, µs per call | scheduler | both, beside the first line | workers | s |")
    print("|---|---|---|---|---|---|---|")
    first: float | None = None
    for count in map(int, options.slots.split(",")):
        descriptors.raise_limit(count * descriptors.CALLER_PER_SLOT)
        with site(count, options.call_ms / 1e3) as where:
            cost = measure(where, options.calls, direct=options.direct)
        ours = cost["caller"] + cost["scheduler"]
        first = first or ours
        print(
            f"| {count:,} | {cost['chunks']:,} | {cost['caller']:.1f} | {cost['scheduler']:.1f} | {ours / first:.2f} × "
            f"| {cost['workers']:.1f} | {cost['seconds']:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
