"""The journal: what is on record of pools, and that it outlives whoever wrote it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from skyward.cleanup import journal
from skyward.cleanup.pool_record import PoolRecord
from skyward.errors import PoolError
from skyward.providers.base import Login, Machine

POOL = "0123abcd"
PEM = "-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n-----END OPENSSH PRIVATE KEY-----\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SKYWARD_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data" / "pools"


def machine(name: str = "a", **login: str) -> Machine:
    return Machine(id=name, provider="ssh", login=Login(host=name, **login), outlives_pool=True)


def open_entry(pool_id: str = POOL, *machines: Machine) -> journal.Entry:
    return journal.open_entry(pool_id, provider="ssh", expires=time.time() + 60, machines=machines)


def test_an_entry_is_on_disk_before_anything_is_launched(folder: Path) -> None:
    entry = open_entry(POOL, machine(user="me", host_key="ssh-ed25519 AAAA"))

    assert journal.read(POOL) == entry
    assert journal.entries() == [entry]
    assert (entry.state, entry.pid, entry.owner_alive, entry.is_expired) == ("launching", os.getpid(), True, False)


def test_what_changes_is_written(folder: Path) -> None:
    entry = journal.update(open_entry(), state="running", machines=[machine("a"), machine("b")])

    assert journal.read(POOL) == entry
    assert entry.state == "running"
    assert [m.id for m in entry.machines] == ["a", "b"]


def test_nodes_are_found_by_their_number_as_machines_come_and_go(folder: Path) -> None:
    record = PoolRecord(POOL, "ssh", time.time() + 60, [machine("a"), machine("b")])
    try:
        record.add([machine("c")])
        record.number([machine("c")], [1])
        record.running(8787)
        replaced = journal.read(POOL)
        record.lost("a")
        record.lost("a")
        lost = journal.read(POOL)
    finally:
        record.close()

    assert replaced is not None
    assert lost is not None
    assert (replaced.state, replaced.dashboard_port, replaced.nodes) == ("running", 8787, {"a": 0, "c": 1})
    assert replaced.machine(1) == machine("c")
    assert (lost.machine(0), lost.machine(1)) == (None, machine("c"))


PLACE = journal.Place(provider="aws", region="eu-west-1")


def test_a_launch_is_on_record_for_as_long_as_it_is_under_way(folder: Path) -> None:
    record = PoolRecord(POOL, "aws", time.time() + 60)
    with record.launching(PLACE), record.launching(PLACE):
        during = journal.read(POOL)
    after = journal.read(POOL)
    record.close()

    assert during is not None
    assert after is not None
    assert during.launching_until > time.time() + 60
    assert (during.places, after.places, after.launching_until) == ((PLACE,), (PLACE,), 0.0)


def test_a_record_that_is_closed_is_never_written_again(folder: Path) -> None:
    record = PoolRecord(POOL, "aws", time.time() + 60)
    with record.launching(PLACE):
        record.close()
        with pytest.raises(PoolError, match="has ended"):
            record.add([machine("late")])

    with pytest.raises(PoolError, match="has ended"), record.launching(PLACE):
        pass
    assert journal.entries() == []


def test_an_entry_that_another_process_has_closed_is_not_made_again(folder: Path) -> None:
    record = PoolRecord(POOL, "aws", time.time() + 60)
    journal.close(POOL)

    with pytest.raises(PoolError, match="was ended by another process"):
        record.add([machine("late")])
    record.close()

    assert journal.entries() == []


def test_nothing_is_kept_of_a_pool_that_has_started_nothing(folder: Path) -> None:
    record = PoolRecord(POOL, "aws", time.time() + 60)
    record.left = ["not confirmed"]

    record.close()

    assert journal.entries() == []
    assert record._guardian._process.returncode is not None


def test_nodes_that_nobody_has_numbered_are_machines_in_their_order(folder: Path) -> None:
    entry = open_entry(POOL, machine("a"), machine("b"))

    assert [entry.machine(n) for n in range(3)] == [machine("a"), machine("b"), None]


def test_a_closed_entry_is_gone_and_may_be_closed_again(folder: Path) -> None:
    open_entry(POOL, machine(key=PEM))

    journal.close(POOL)
    journal.close(POOL)

    assert journal.read(POOL) is None
    assert list(folder.iterdir()) == []


def test_closing_one_pool_leaves_the_others(folder: Path) -> None:
    open_entry()
    other = open_entry(f"{POOL}0")

    journal.close(POOL)

    assert journal.entries() == [other]


def test_only_the_user_can_read_it(folder: Path) -> None:
    open_entry(POOL, machine(key=PEM))

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_a_private_key_is_kept_beside_the_entry_and_never_in_it(folder: Path) -> None:
    other = PEM.replace("c2VjcmV0", "b3RoZXI=")
    entry = open_entry(POOL, machine("a", key=PEM), machine("b", key=PEM), machine("c", key=other))

    keys = [m.login.key for m in entry.machines]
    assert [Path(key).read_text() for key in keys if key] == [PEM, PEM, other]
    assert keys[0] == keys[1] == str(folder / f"{POOL}.key")
    assert "c2VjcmV0" not in repr(entry) + (folder / f"{POOL}.json").read_text()
    assert journal.update(entry, state="running").machines == entry.machines


def test_paths_hold_wherever_they_are_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    entry = open_entry(POOL, machine(key="id", known_hosts="~/hosts"))

    assert entry.machines[0].login.key == str(tmp_path / "id")
    assert entry.machines[0].login.known_hosts == str(Path.home() / "hosts")


def test_a_process_with_the_number_of_the_owner_is_not_the_owner(folder: Path) -> None:
    entry = open_entry()

    assert not dataclasses.replace(entry, pid_started=entry.pid_started - 3600).owner_alive
    assert dataclasses.replace(entry, host="elsewhere").owner_alive is None


def test_an_owner_that_has_ended_is_gone_whether_or_not_anybody_noticed(folder: Path) -> None:
    code = f"from skyward.cleanup import journal; journal.open_entry({POOL!r}, provider='ssh', expires=0)"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # not reaped: a zombie
        entry = journal.read(POOL)
        assert entry is not None
        assert entry.owner_alive is False

    assert entry.owner_alive is False
    assert entry.is_expired


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"machines": [1]}', json.dumps({"pool_id": POOL})])
def test_what_cannot_be_read_is_told_and_left_out(folder: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    entry = open_entry()
    (folder / "ffffffff.json").write_text(text)

    with caplog.at_level(logging.WARNING):
        assert journal.entries() == [entry]

    assert "ffffffff.json can't be read, and its pool may still run" in caplog.text
    with pytest.raises(ValueError):
        journal.read("ffffffff")


def test_an_entry_under_another_name_is_refused(folder: Path) -> None:
    open_entry()
    (folder / "ffffffff.json").write_text((folder / f"{POOL}.json").read_text())

    with pytest.raises(ValueError, match="not an entry"):
        journal.read("ffffffff")


def test_what_a_later_version_added_does_no_harm(folder: Path) -> None:
    entry = open_entry(POOL, machine())
    path = folder / f"{POOL}.json"
    data = json.loads(path.read_text())
    data["new"] = data["machines"][0]["new"] = data["machines"][0]["login"]["new"] = 1
    path.write_text(json.dumps(data))

    assert journal.read(POOL) == entry


@pytest.mark.parametrize("name", ["", "x", "../../etc/passwd", "0123ABCD", "0123abcd\n", "*"])
def test_an_id_that_would_be_another_path_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="id of a pool"):
        journal.read(name)


def test_a_journal_that_cannot_be_written_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SKYWARD_DATA_DIR", str(tmp_path / "file"))

    with pytest.raises(PoolError, match="Set SKYWARD_DATA_DIR"):
        open_entry()


def test_a_reader_never_sees_half_an_entry(folder: Path) -> None:
    entry = open_entry()
    code = (
        "from skyward.cleanup import journal\n"
        f"entry = journal.read({POOL!r})\n"
        "for i in range(300): entry = journal.update(entry, state=('running', 'stopping')[i % 2])"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as writer:
        while writer.poll() is None:
            found = journal.read(POOL)
            assert found is not None
            assert found.created == entry.created

    assert writer.returncode == 0
