"""An agent starts a scheduler when it is told to, joins others, and tells of a scheduler that ends."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import pytest

from skyward.node import descendants, scheduler_process
from skyward.node.config import AgentConfig, NodeSpec
from skyward.node.tls import Credentials, make_credentials
from tests.waiting import wait_until

HANG_S = 3.0
BEAT_S = 0.2
TIMEOUT_S = 60.0
SCRIPT = f"""
from skyward.node import reach, scheduler_process
reach.PATIENCE_S = 3.0
scheduler_process.HANG_S, scheduler_process.BEAT_S = {HANG_S}, {BEAT_S}
from skyward.node.agent import main
main()
"""


class Agent:
    """A real agent of one node with one slot, over its standard input and output."""

    def __init__(self, pool_id: str, credentials: Credentials, *, node: int = 0, **options: Any) -> None:
        self.folder = tempfile.mkdtemp(prefix="skyward-")
        self._security = credentials.security()
        config = AgentConfig(
            pool_id=pool_id,
            folder=self.folder,
            ttl_s=600,
            ca=credentials.ca,
            certificate=credentials.certificate,
            key=credentials.key,
            nodes=(NodeSpec(node, ({},), ({},)),),
            **options,
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "SKYWARD_POOL": pool_id},
            start_new_session=True,
        )
        self._write(config.to_json())
        self._told: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._told.put(json.loads(line))

    def do(self, command: str, **facts: Any) -> None:
        self._write(json.dumps({"do": command, **facts}))

    def until(self, event: str) -> dict[str, Any]:
        """Return the next event of this name. Others before it are dropped, but for failures."""
        while True:
            told = self._told.get(timeout=TIMEOUT_S)
            if told["event"] == event:
                return told
            assert told["event"] not in ("failed", "scheduler-ended"), told

    def start_scheduler(self) -> str:
        """Have it start a scheduler, which its worker joins; return the address."""
        self.do("scheduler")
        return self.joined_own()

    def joined_own(self) -> str:
        address = str(self.until("scheduler")["address"])
        worker = self.until("worker")["address"]
        assert workers_of(address, self._security) == {worker}
        return address

    def scheduler(self, address: str) -> psutil.Process:
        """Return the process of its scheduler."""
        port = int(address.rpartition(":")[2])
        (found,) = [
            process
            for process in psutil.Process(self.process.pid).children(recursive=True)
            if any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in process.net_connections())
        ]
        return found

    def close(self) -> None:
        descendants.kill_descendants(self.process.pid)
        self.process.kill()
        self.process.communicate()
        shutil.rmtree(self.folder, ignore_errors=True)


def workers_of(address: str, security: Any) -> set[str]:
    from distributed.core import rpc

    async def ask() -> Mapping[str, Any]:
        async with rpc(address, connection_args=security.get_connection_args("client")) as scheduler:
            found: Mapping[str, Any] = await scheduler.identity()
            return found

    return set(asyncio.run(ask())["workers"])


@pytest.fixture(scope="module")
def credentials() -> Credentials:
    return make_credentials("feed0001", lifetime_s=600)


@pytest.fixture(scope="module")
def security(credentials: Credentials) -> Any:
    return credentials.security()


@pytest.fixture(scope="module")
def first(credentials: Credentials) -> Iterator[Agent]:
    agent = Agent("feed0001", credentials)
    try:
        yield agent
    finally:
        agent.close()


@pytest.fixture(scope="module")
def second(credentials: Credentials) -> Iterator[Agent]:
    agent = Agent("feed0002", credentials, node=1, scheduler="")
    try:
        agent.until("ready")
        yield agent
    finally:
        agent.close()


def test_another_scheduler_starts_after_one_that_was_killed(first: Agent) -> None:
    address = first.joined_own()
    first.until("dashboard")

    first.scheduler(address).kill()

    assert first.until("scheduler-ended")["why"] == "the Dask scheduler was ended by signal 9"
    assert first.start_scheduler() != address
    first.until("dashboard")


def test_a_scheduler_that_hangs_is_killed_and_told(first: Agent) -> None:
    scheduler = first.scheduler(first.start_scheduler())

    scheduler.suspend()

    why = f"the event loop of the Dask scheduler has not moved for {HANG_S:g} s"
    assert first.until("scheduler-ended")["why"] == why
    scheduler.wait(TIMEOUT_S)


def test_a_scheduler_that_hangs_is_replaced(first: Agent) -> None:
    address = first.start_scheduler()
    scheduler = first.scheduler(address)

    scheduler.suspend()

    assert first.start_scheduler() != address
    scheduler.wait(TIMEOUT_S)


def test_an_agent_that_was_suspended_takes_no_scheduler_for_hung(first: Agent) -> None:
    address = first.start_scheduler()
    agent = psutil.Process(first.process.pid)

    agent.suspend()
    until = time.monotonic() + HANG_S + 2 * BEAT_S
    wait_until(lambda: time.monotonic() > until)
    agent.resume()

    first.do("remove", nodes=[])
    assert first.until("removed")
    assert first.scheduler(address).is_running()


def test_unread_beats_block_nothing_and_go_on_when_read() -> None:
    ours, theirs = multiprocessing.Pipe()

    async def beat() -> None:
        beats = asyncio.create_task(scheduler_process._beat(theirs, 0.0))
        for _ in range(2_000):  # more than the pipe has room for
            await asyncio.sleep(0)
        while ours.poll():
            ours.recv()
        while not ours.poll():
            await asyncio.sleep(0)
        beats.cancel()

    beating = threading.Thread(target=asyncio.run, args=[beat()], daemon=True)
    beating.start()
    beating.join(TIMEOUT_S)

    assert not beating.is_alive()
    assert ours.recv() == "beat"


def test_workers_move_to_another_scheduler_and_back(first: Agent, second: Agent, security: Any) -> None:
    theirs = first.start_scheduler()
    second.do("join", address=theirs)
    joined = second.until("worker")
    assert joined["address"] in workers_of(theirs, security)
    own = second.start_scheduler()
    assert not psutil.pid_exists(joined["pid"])
    scheduler = second.scheduler(own)

    second.do("join", address=theirs)

    again = second.until("worker")
    assert again["address"] in workers_of(theirs, security)
    scheduler.wait(TIMEOUT_S)  # no event: a command asked for this
    second.do("join", address=theirs)  # nothing is to change
    second.do("remove", nodes=[])
    second.until("removed")
    assert psutil.pid_exists(again["pid"])


def test_an_agent_that_leaves_has_no_worker_and_no_scheduler(second: Agent) -> None:
    address = second.start_scheduler()
    scheduler = second.scheduler(address)

    second.do("join", address="")

    second.until("exited")
    scheduler.wait(TIMEOUT_S)
    second.start_scheduler()


def test_a_join_that_is_overtaken_changes_nothing(first: Agent, second: Agent, security: Any) -> None:
    address = first.start_scheduler()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        second.do("join", address=f"tls://127.0.0.1:{silent.getsockname()[1]}")
        with silent.accept()[0]:  # it tries
            second.do("scheduler")
            second.do("join", address=f"tls://127.0.0.1:{silent.getsockname()[1]}")
            second.do("join", address=address)

            worker = second.until("worker")

    assert worker["address"] in workers_of(address, security)


def test_workers_wait_when_their_scheduler_is_gone(first: Agent, second: Agent, security: Any) -> None:
    address = first.start_scheduler()
    second.do("join", address=address)
    second.until("worker")

    first.scheduler(address).kill()
    second.until("exited")
    first.until("scheduler-ended")

    address = first.start_scheduler()
    second.do("join", address=address)
    assert second.until("worker")["address"] in workers_of(address, security)


def test_a_scheduler_that_is_not_reached_is_told_with_its_address(second: Agent) -> None:
    second.start_scheduler()
    with socket.create_server(("127.0.0.1", 0)) as there:
        silent = f"tls://127.0.0.1:{there.getsockname()[1]}"

    second.do("join", address=silent)

    failed = second.until("failed")
    assert failed["error"].startswith(f"node 1 at 127.0.0.1 can't reach the scheduler's node, at {silent}: ")
    assert failed["address"] == silent
    second.start_scheduler()


def test_a_scheduler_that_does_not_start_is_told(credentials: Credentials) -> None:
    agent = Agent("feed0003", credentials, host="192.0.2.1")
    try:
        error = agent.until("failed")["error"]
    finally:
        agent.close()
    assert error.startswith("the Dask scheduler did not start: ")
    assert error.endswith("Cannot assign requested address")


def test_a_scheduler_ends_when_its_agent_is_killed(second: Agent) -> None:
    scheduler = second.scheduler(second.start_scheduler())
    assert scheduler in descendants.processes_of("feed0002")

    second.process.kill()

    scheduler.wait(TIMEOUT_S)
