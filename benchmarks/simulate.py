"""What the caller's side costs by itself: CPU time per call, for more and more calls and workers.

Usage: python benchmarks/simulate.py

The engine is real; workers answer at once and say that a call took a millisecond, so chunks are as large as they would
be. What is left is packing, sharing out, and unpacking: what limits how many workers one caller keeps busy.
"""

from __future__ import annotations

import asyncio
import os
import platform
import threading
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

from skyward.engine import Call, Engine, engine
from skyward.engine.estimates import Estimates
from skyward.engine.run import stream
from skyward.transfer import pickling
from skyward.transfer.wire import Chunk, Kind, Outcome, Outcomes, Slot

CALL_S = 0.001
DONE = Outcome(Kind.VALUE, pickling.dumps(None)[0], seconds=CALL_S, machine="node 0, slot 0")


class Instant:
    """Stands in for the engine's transport."""

    def __init__(self) -> None:
        self.chunks = 0
        self.delivery = SimpleNamespace(update=lambda *_: None)

    async def prepare(self, *_: Any) -> None:
        pass

    async def settle(self) -> None:
        pass

    async def send(self, _: str, chunk: Chunk, when_sent: Any) -> Outcomes:
        when_sent()
        self.chunks += 1
        await asyncio.sleep(0)
        return Outcomes([DONE] * len(chunk.calls))

    async def take_back(self, *_: Any) -> None:
        pass

    def forget(self) -> None:
        pass


def measure(client: Any, calls: int, workers: int) -> tuple[float, float]:
    """Return seconds of CPU time per call and per chunk."""
    transport = Instant()
    slots = [Slot(f"w{number}", number, 0) for number in range(workers)]
    with mock.patch.object(engine, "Transport", return_value=transport):
        made = Engine(client, lambda: slots, pool_id="simulated", alive=lambda: [s.address for s in slots])
        made.wait_ready()
        try:
            began = time.process_time()
            for _ in stream(made, (Call(divmod, (i, 7)) for i in range(calls)), ordered=False):
                pass
            took = time.process_time() - began
        finally:
            made.close()
    return took / calls, took / transport.chunks


def main() -> None:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    client = SimpleNamespace(loop=SimpleNamespace(asyncio_loop=loop), status="running")
    measure(client, 1000, 2)
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores\n")
    print("| calls | workers | µs per call | ms per chunk | workers that one caller keeps busy |")
    print("|---|---|---|---|---|")
    sizes = [(calls, 10) for calls in (1_000, 10_000, 100_000, 1_000_000)]
    for calls, workers in sizes + [(200_000, workers) for workers in (10, 100, 300, 1_000)]:
        call, chunk = min(measure(client, calls, workers) for _ in range(3 if calls <= 200_000 else 1))
        most = CALL_S / call
        print(f"| {calls:,} | {workers:,} | {call * 1e6:.1f} | {chunk * 1e3:.2f} | {most:.0f} |")
    print(f"\nCalls of {CALL_S * 1e3:g} ms in chunks of up to {Estimates.TARGET_S:g} s. Of calls of a second it")
    print("keeps a thousand times as many workers busy.")


if __name__ == "__main__":
    main()
