"""The guardian: it ends a pool whose owner can't, and only such a one."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from skyward.cleanup import guardian as guardian_module
from skyward.cleanup import journal
from skyward.cleanup.guardian import GIVE_UP_S, HEADROOM_S, LOG, Guardian
from skyward.cluster.machine_commands import pool_folder
from tests.sshhost import Host
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="hosts are Linux, and the host here is this machine")

OWNER = """
import os, signal, sys
from skyward.cleanup.guardian import Guardian

guardian = Guardian.start(sys.argv[1])
if "fork" in sys.argv and os.fork() == 0:
    signal.pause()
print(guardian._process.pid, flush=True)
signal.pause()
"""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SKYWARD_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def host(data: Path, tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.stop()


class Remains:
    """What a pool has left on a machine: a process and a folder."""

    def __init__(self, pool_id: str) -> None:
        environment = {**os.environ, "SKYWARD_POOL": pool_id}
        self.process = subprocess.Popen(["sleep", "600"], env=environment, start_new_session=True)
        self.folder = Path(pool_folder(pool_id))
        self.folder.mkdir()

    @property
    def are_gone(self) -> bool:
        return self.process.poll() is not None and not self.folder.exists()

    def remove(self) -> None:
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


Starter = Callable[[str], Guardian]


@pytest.fixture
def start_guardian(data: Path) -> Iterator[Starter]:
    """Start a guardian that does not outlive the test. A test that fails shows its log."""
    started: list[Guardian] = []

    def start(pool_id: str) -> Guardian:
        started.append(Guardian.start(pool_id))
        return started[-1]

    yield start
    for guardian in started:
        guardian._process.kill()
        guardian._process.wait()
        guardian.dismiss()
    with contextlib.suppress(FileNotFoundError):
        print((data / LOG).read_text())


@pytest.fixture
def pool_id() -> str:
    return secrets.token_hex(4)


@pytest.fixture
def remains(pool_id: str) -> Iterator[Remains]:
    remains = Remains(pool_id)
    yield remains
    remains.remove()


def open_entry(pool_id: str, host: Host, *, expires_in: float = 600, key: str | None = None) -> journal.Entry:
    expires = time.time() + expires_in
    return journal.open_entry(pool_id, provider="ssh", expires=expires, machines=[host.machine(key=key)])


def is_ended(pool_id: str, remains: Remains) -> bool:
    return remains.are_gone and journal.read(pool_id) is None


@pytest.mark.parametrize("forks", ["fork", "no fork"])
def test_a_pool_is_ended_when_its_owner_is_killed(pool_id: str, host: Host, remains: Remains, forks: str) -> None:
    host.start()
    open_entry(pool_id, host)
    command = [sys.executable, "-c", OWNER, pool_id, forks]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as owner:
        try:
            assert owner.stdout is not None
            guardian = psutil.Process(int(owner.stdout.readline()))
            assert remains.process.poll() is None

            owner.kill()

            wait_until(lambda: is_ended(pool_id, remains))
        finally:
            os.killpg(owner.pid, signal.SIGKILL)
            with contextlib.suppress(psutil.NoSuchProcess):
                guardian.kill()


def test_a_dismissed_guardian_ends_nothing(pool_id: str, start_guardian: Starter, host: Host, remains: Remains) -> None:
    host.start()
    entry = open_entry(pool_id, host)
    guardian = start_guardian(pool_id)

    guardian.dismiss()
    guardian.dismiss()

    assert guardian._process.returncode in (0, -signal.SIGKILL)  # the latter where starting takes it very long
    assert remains.process.poll() is None
    assert journal.read(pool_id) == entry


def test_a_pool_is_ended_when_its_time_has_long_been_over(
    pool_id: str, start_guardian: Starter, host: Host, remains: Remains
) -> None:
    host.start()
    open_entry(pool_id, host, expires_in=-HEADROOM_S)

    start_guardian(pool_id)

    wait_until(lambda: is_ended(pool_id, remains))


def test_it_waits_a_little_longer_than_the_pools_own_timers(
    pool_id: str, start_guardian: Starter, host: Host, remains: Remains
) -> None:
    host.start()
    open_entry(pool_id, host, expires_in=3 - HEADROOM_S)
    started = time.monotonic()

    start_guardian(pool_id)

    wait_until(lambda: is_ended(pool_id, remains))
    assert time.monotonic() - started > 2.5


def test_a_pool_that_could_not_be_ended_is_handed_over(
    pool_id: str, start_guardian: Starter, host: Host, remains: Remains, data: Path
) -> None:
    open_entry(pool_id, host)
    guardian = start_guardian(pool_id)

    guardian.hand_over()
    wait_until(lambda: "may still run" in (data / LOG).read_text())
    assert journal.read(pool_id) is not None
    host.start()

    wait_until(lambda: is_ended(pool_id, remains))


def test_what_it_cannot_end_stays_on_record(pool_id: str, start_guardian: Starter, host: Host, data: Path) -> None:
    entry = open_entry(pool_id, host, expires_in=-GIVE_UP_S - 1)

    guardian = start_guardian(pool_id)

    assert guardian._process.wait(30) == 1
    assert journal.read(pool_id) == entry
    assert "given up" in (data / LOG).read_text()


def test_signals_do_not_end_it(pool_id: str, start_guardian: Starter, host: Host, remains: Remains) -> None:
    host.start()
    open_entry(pool_id, host)
    guardian = start_guardian(pool_id)
    pid = guardian._process.pid
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    wait_until(lambda: all(ignores(pid, number) for number in numbers))  # under nohup SIGHUP is from the start

    for number in numbers:
        os.kill(pid, number)
    guardian.hand_over()

    wait_until(lambda: is_ended(pool_id, remains))


def ignores(pid: int, number: signal.Signals) -> bool:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn")]
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


def test_a_key_that_only_its_owner_knew_is_used_and_shown_nowhere(
    pool_id: str, start_guardian: Starter, host: Host, remains: Remains, data: Path
) -> None:
    host.start()
    key = host.key.export_private_key().decode()
    secret = key.splitlines()[2]
    open_entry(pool_id, host, key=key)
    guardian = start_guardian(pool_id)
    process = psutil.Process(guardian._process.pid)
    assert secret not in " ".join([*process.cmdline(), *process.environ().values()])

    guardian.hand_over()

    wait_until(lambda: is_ended(pool_id, remains))
    assert list((data / "pools").iterdir()) == []
    assert secret not in (data / LOG).read_text()


def test_a_guardian_is_no_process_of_the_pool_inside_which_it_was_started(
    pool_id: str, start_guardian: Starter, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKYWARD_POOL", "00000000")
    open_entry(pool_id, host)

    guardian = start_guardian(pool_id)

    assert "SKYWARD_POOL" not in psutil.Process(guardian._process.pid).environ()


def test_to_dismiss_one_that_is_dead_does_no_harm(
    pool_id: str, start_guardian: Starter, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    open_entry(pool_id, host)
    guardian = start_guardian(pool_id)
    guardian._process.kill()
    guardian._process.wait()

    with caplog.at_level(logging.WARNING):
        guardian.dismiss()

    assert "the guardian has ended before its pool" in caplog.text


def test_waiting_costs_little() -> None:
    code = "import sys, skyward.cleanup.guardian; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()

    assert {"asyncio", "asyncssh", "dask", "distributed", "cryptography"}.isdisjoint(loaded)


def test_it_closes_at_once_what_has_started_nothing(pool_id: str, start_guardian: Starter, data: Path) -> None:
    journal.open_entry(pool_id, provider="aws", expires=time.time() + 600)
    guardian = start_guardian(pool_id)

    guardian.hand_over()

    wait_until(lambda: "nothing was started" in (data / LOG).read_text())
    assert journal.read(pool_id) is None


def test_an_entry_that_it_cannot_read_is_told_in_its_log(pool_id: str, start_guardian: Starter, data: Path) -> None:
    journal.open_entry(pool_id, provider="aws", expires=time.time() + 600)
    (data / "pools" / f"{pool_id}.json").write_text("{")

    guardian = start_guardian(pool_id)

    assert guardian._process.wait(30) == 1
    assert "can't be read: nothing is guarded" in (data / LOG).read_text()


@pytest.mark.parametrize(("state", "launching_s", "looks"), [
    ("stopping", 0, 1),  # its owner has waited for all launches
    ("running", 0, 2),  # what was launched last may not be listed yet
    ("launching", 1200, 21),
    ("stopping", 1200, 21),
])  # fmt: skip
def test_it_looks_again_for_as_long_as_a_launch_may_take(
    pool_id: str, data: Path, monkeypatch: pytest.MonkeyPatch, state: journal.State, launching_s: int, looks: int
) -> None:
    now, seen = time.time(), []
    place = journal.Place(provider="aws", region="eu-west-1")
    entry = journal.open_entry(
        pool_id, provider="aws", expires=now + 7200, state=state, places=(place,),
        launching_until=now + launching_s if launching_s else 0.0,
    )  # fmt: skip

    class Owner(guardian_module._Owner):
        def listen(self, seconds: float) -> None:
            nonlocal now
            now += seconds

    monkeypatch.setattr(guardian_module, "time", SimpleNamespace(time=lambda: now))
    monkeypatch.setattr("skyward.cleanup.end.end_pool", lambda entry: seen.append(entry.pool_id) or [])

    assert guardian_module._end(entry, Owner()) == 0

    assert len(seen) == looks
    assert journal.read(pool_id) is None
