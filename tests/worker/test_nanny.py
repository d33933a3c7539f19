"""Worker processes of our own: calls see the main thread of a process, as under loky."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import skyward as sky
from tests.waiting import wait_until


@pytest.mark.filterwarnings("ignore:There is no current event loop")  # as in any process from Python 3.12 on
def test_a_call_has_the_main_thread_with_its_signals_and_event_loop(pool: sky.ComputePool) -> None:
    async def answer() -> int:
        return 5

    def use_all() -> list[Any]:
        def ring(*_: object) -> None:
            raise TimeoutError("too long")

        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        try:
            time.sleep(60)
        except TimeoutError as exc:
            said = str(exc)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return [is_main, said, asyncio.get_event_loop().run_until_complete(answer())]

    # A call that is a coroutine leaves the loop of later ones alone.
    assert sky.gather(*[sky.compute(answer)()] * 4) >> pool == (5,) * 4
    assert sky.compute(use_all)() @ pool.slots == ([True, "too long", 5],) * 4


def test_a_nested_parallel_has_processes_of_loky(pool: sky.ComputePool) -> None:
    def nest() -> tuple[int, set[int]]:
        from joblib import Parallel, delayed
        from joblib.externals.loky import get_reusable_executor

        found = Parallel(n_jobs=2, backend="loky")(delayed(os.getpid)() for _ in range(4))
        get_reusable_executor().shutdown(wait=True)
        return os.getpid(), set(found)

    pid, others = sky.compute(nest)() >> pool

    assert others
    assert pid not in others


def test_programs_of_a_call_heed_an_interrupt(pool: sky.ComputePool) -> None:
    def start() -> int:
        return subprocess.run(["sh", "-c", "kill -INT $$; sleep 1"]).returncode

    assert sky.compute(start)() >> pool == -signal.SIGINT


def test_a_call_that_waits_is_interrupted_and_its_process_stays(tmp_path: Path) -> None:
    def wait(path: Path) -> None:
        path.touch()
        time.sleep(60)

    with sky.ComputePool("local", display="quiet") as pool:
        pid = sky.compute(os.getpid)() >> pool
        waiting = pool.submit(sky.compute(wait)(tmp_path / "begun"))
        wait_until((tmp_path / "begun").exists)
        waiting.cancel()
        assert sky.compute(os.getpid)() >> pool == pid
        with pytest.raises(TimeoutError):
            sky.compute(timeout=0.5)(wait)(tmp_path / "again") >> pool
        assert sky.compute(os.getpid)() >> pool == pid


def test_a_task_that_secedes_lets_others_run_meanwhile(tmp_path: Path) -> None:
    go = tmp_path / "go"

    def secede_and_wait(go: Path) -> str:
        from distributed import secede

        secede()
        while not go.exists():
            time.sleep(0.01)
        return threading.current_thread().name

    def thread() -> str:
        return threading.current_thread().name

    with sky.ComputePool("local", display="quiet") as pool:
        seceded = pool.client.submit(secede_and_wait, go)
        assert pool.client.submit(thread, pure=False).result(30) != "MainThread"
        go.touch()
        assert seceded.result(30) == "MainThread"
        wait_until(lambda: pool.client.submit(thread, pure=False).result(30) == "MainThread")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_node_is_removed_while_its_main_thread_is_busy(tmp_path: Path) -> None:
    @sky.compute
    def hold(folder: Path) -> int:
        (folder / str(os.getpid())).touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        return os.getpid()

    with sky.ComputePool("local", nodes=2, display="quiet") as pool:
        futures = [pool.submit(hold(tmp_path)) for _ in range(2)]
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
        pids = {int(path.name) for path in tmp_path.iterdir()}
        pool.scale(1)
        wait_until(lambda: any(not Path(f"/proc/{pid}").exists() for pid in pids))
        (tmp_path / "go").touch()
        assert {future.result(60) for future in futures} < pids
