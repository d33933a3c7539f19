"""What an agent does for the worker process of a slot."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from skyward.node.worker_slot import kill_if_stopped


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_process_that_stays_stopped_is_killed(process: subprocess.Popen[bytes]) -> None:
    killed: list[int | None] = []

    async def main() -> None:
        watching = asyncio.create_task(kill_if_stopped(lambda: process.pid, lambda: killed.append(1), look_s=0.05))
        for _ in range(3):  # now and then is no reason
            process.send_signal(signal.SIGSTOP)
            while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
                await asyncio.sleep(0)
            process.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.2)
        assert not killed
        process.send_signal(signal.SIGSTOP)
        await asyncio.to_thread(process.wait, 30)
        watching.cancel()

    asyncio.run(main())

    assert killed == [1]
    assert process.returncode == -signal.SIGKILL
