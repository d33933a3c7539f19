"""What calls have started ends with the pool, whatever it has become."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

import skyward as sky
from skyward.node import descendants
from tests.daemons import start_daemon
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="orphans can be adopted on Linux only")


@pytest.fixture
def own_pool() -> Iterator[sky.ComputePool]:
    with sky.ComputePool("local", display="quiet") as pool:
        yield pool


def test_a_daemon_without_environment_ends_with_its_pool() -> None:
    with sky.ComputePool("local", display="quiet") as pool:
        pid = sky.compute(start_daemon)() >> pool
        parent = psutil.Process(pid).parent()
        assert parent is not None
        assert parent.pid not in (1, os.getpid())

    wait_until(lambda: not psutil.pid_exists(pid))


def test_a_daemon_ends_when_its_agent_is_killed(own_pool: sky.ComputePool) -> None:
    pid = sky.compute(start_daemon)() >> own_pool
    (agent,) = [p for p in psutil.Process(pid).parents() if "skyward.node.agent" in p.cmdline()]

    agent.kill()

    wait_until(lambda: not psutil.pid_exists(pid))


def test_an_orphan_that_ends_is_no_zombie(own_pool: sky.ComputePool) -> None:
    pid = sky.compute(start_daemon)() >> own_pool
    os.kill(pid, 9)

    wait_until(lambda: not psutil.pid_exists(pid))
    assert sky.compute(abs)(-1) >> own_pool == 1


def test_what_ends_by_itself_is_spared() -> None:
    leaving = ["sh", "-c", "sleep 600; :", descendants.LEAVE]
    script = f"import subprocess; subprocess.Popen(['sleep', '600']); subprocess.run({leaving!r})"
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        me = psutil.Process(parent.pid)
        wait_until(lambda: len(me.children(recursive=True)) == 3)
        spared = [c for c in me.children() if descendants.LEAVE in c.cmdline()]
        spared += spared[0].children()
        try:
            descendants.kill_descendants(parent.pid)

            running = [c for c in me.children(recursive=True) if c.status() != psutil.STATUS_ZOMBIE]
            assert set(running) == set(spared)
        finally:
            for process in spared:
                process.kill()


def test_a_pools_processes_are_found_by_environment_and_group() -> None:
    marked = {**os.environ, "SKYWARD_POOL": "0123feed"}
    wait = [sys.executable, "-c", "import time; time.sleep(600)"]
    ours = subprocess.Popen(wait, env=marked, start_new_session=True)
    tracker = subprocess.Popen([*wait, descendants.TRACKER], env=marked, start_new_session=True)
    grouped = subprocess.Popen(wait, start_new_session=True)
    try:
        found = {process.pid for process in descendants.processes_of("0123feed")}
        with_group = {process.pid for process in descendants.processes_of("0123feed", group=grouped.pid)}
    finally:
        for process in (ours, tracker, grouped):
            process.kill()
            process.wait()

    assert found == {ours.pid}
    assert with_group == {ours.pid, grouped.pid}
