"""The command line."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from skyward.cli import main
from skyward.cluster import journal
from skyward.providers.base import Machine
from skyward.version import __version__
from tests.sshhost import Host

linux = pytest.mark.skipif(sys.platform != "linux", reason="hosts are Linux, and the host here is this machine")


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SKYWARD_DATA_DIR", str(tmp_path / "data"))
    # No cloud is asked: there are no credentials, and none are looked for on the network.
    for variable in [v for v in os.environ if v.startswith(("AWS_", "DIGITALOCEAN_", "VERDA_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for variable in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    return tmp_path / "data"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path)
    yield host
    host.stop()


def skyward(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def add_pool(*machines: Machine, provider: str = "ssh", expires_in: float = 600, owned: bool = True) -> str:
    """Put a pool on record; `owned`: this process is its owner, else one that has ended."""
    pool_id = secrets.token_hex(4)
    expires = time.time() + expires_in
    entry = journal.open_entry(pool_id, provider=provider, expires=expires, machines=machines)
    if not owned:
        journal.update(replace(entry, pid_started=entry.pid_started - 3600))
    return pool_id


def test_it_tells_its_version() -> None:
    assert skyward("--version").output == f"skyward {__version__}\n"


def test_no_pools_are_no_error() -> None:
    assert skyward("ps").output == "no pools\n"
    assert skyward("ps", "--json").output == "[]\n"
    assert skyward("down", "--all").output == "no pools\n"
    assert skyward("down", "--expired").output == "no expired pools\n"


def test_ps_has_a_line_for_each_pool(host: Host) -> None:
    machines = [replace(host.machine(), id=f"user@machine-{n:02}.example.com") for n in range(20)]
    mine = add_pool(*machines, expires_in=7210)
    orphan = add_pool(owned=False, expires_in=-1)

    result = skyward("ps")

    heading, first, second = result.output.splitlines()
    assert heading.split()[:5] == ["POOL", "PROVIDER", "MACHINES", "STATE", "AGE"]
    assert first.startswith(f"{mine}  ssh")
    assert "user@machine-00.example.com, user@machine-01" in first
    assert "launching" in first
    assert "2 h 00 min" in first
    assert first.endswith(f"pid {os.getpid()}")
    assert second.startswith(f"{orphan}  ssh       none yet")
    assert "expired" in second
    assert second.endswith("gone (orphaned)")


def test_ps_tells_programs_the_same_and_no_secret(host: Host) -> None:
    pool_id = add_pool(host.machine(key=host.key.export_private_key().decode()))

    result = skyward("ps", "--json")

    (pool,) = json.loads(result.output)
    assert pool["pool"] == pool_id
    assert pool["machines"][0]["host"] == "127.0.0.1"
    assert pool["owner"]["alive"] is True
    assert "key" not in result.output


@linux
def test_down_ends_what_is_left_of_a_pool(host: Host) -> None:
    host.start()
    pool_id = add_pool(host.machine(), owned=False)
    other = add_pool(host.machine(), owned=False)
    environment = {**os.environ, "SKYWARD_POOL": pool_id}

    with subprocess.Popen(["sleep", "600"], env=environment, start_new_session=True) as left:
        result = skyward("down", pool_id)
        assert left.wait(10) == -9

    assert result.output == f"pool {pool_id}: ended on 1 machine\n"
    assert result.exit_code == 0
    assert [entry.pool_id for entry in journal.entries()] == [other]


@linux
@pytest.mark.parametrize("which", ["--all", "--expired"])
def test_down_ends_several_pools(host: Host, which: str) -> None:
    host.start()
    expired = {add_pool(host.machine(), expires_in=-1) for _ in range(2)}
    running = add_pool(host.machine())

    result = skyward("down", which, "--yes")

    assert result.exit_code == 0
    left = {entry.pool_id for entry in journal.entries()}
    assert left == (set() if which == "--all" else {running})
    assert all(f"pool {pool_id}: ended" in result.output for pool_id in expired)


@linux
def test_down_names_machines_that_may_still_run_and_keeps_the_entry(host: Host, tmp_path: Path) -> None:
    host.start()
    (tmp_path / "silent").mkdir()
    silent = Host(tmp_path / "silent").machine()
    pool_id = add_pool(host.machine(), silent, owned=False)

    result = skyward("down", pool_id)

    assert result.exit_code == 1
    heading, line = result.stderr.splitlines()
    assert heading == f"pool {pool_id}: may still run on"
    assert line.startswith(f"  {silent.id}: ")
    assert "does not answer over SSH" in line
    assert journal.read(pool_id) is not None


def test_down_of_a_provider_that_it_does_not_know_goes_on_with_the_others() -> None:
    unknown = add_pool(provider="nimbus", owned=False)
    entry = journal.read(unknown)
    assert entry is not None
    journal.update(entry, places=[journal.Place(provider="nimbus", region="stratus")])
    known = add_pool(owned=False)

    result = skyward("down", "--all")

    assert result.exit_code == 1
    assert f"pool {unknown}: may still run" in result.stderr
    assert "'nimbus'" in result.stderr
    assert [entry.pool_id for entry in journal.entries()] == [unknown]
    assert f"pool {known}: ended on 0 machines" in result.stdout


@pytest.mark.parametrize("arguments", [[], ["--all", "--expired"], ["0123abcd", "--all"]])
def test_down_wants_to_know_which_pools(arguments: list[str]) -> None:
    result = skyward("down", *arguments)

    assert result.exit_code == 2
    assert "say which pools" in result.stderr
    assert "--expired" in result.stderr


def test_down_of_an_unknown_pool_names_the_nearest_and_ends_none() -> None:
    pool_id = add_pool(owned=False)

    result = skyward("down", pool_id, f"{pool_id[:-1]}x", "zzzzzzzz")

    assert result.exit_code == 2
    assert f"the nearest are {pool_id}" in result.stderr
    assert "no pool 'zzzzzzzz'; `skyward ps` lists them" in result.stderr
    assert journal.read(pool_id) is not None


def test_down_of_a_pool_in_use_wants_a_yes_where_nobody_can_be_asked() -> None:
    mine, orphan = add_pool(), add_pool(owned=False)

    result = skyward("down", "--all")

    assert result.exit_code == 2
    assert f"in use: {mine}. " in result.stderr
    assert "--yes" in result.stderr
    assert {entry.pool_id for entry in journal.entries()} == {mine, orphan}


@pytest.mark.parametrize(("answer", "status"), [("n", 1), ("y", 0)])
def test_down_of_a_pool_in_use_asks_first(answer: str, status: int) -> None:
    pool_id = add_pool()
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "skyward.cli", "down", pool_id]

    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        os.write(ours, f"{answer}\n".encode())
        output, _ = process.communicate(timeout=30)
    os.close(ours)
    os.close(theirs)

    assert process.returncode == status
    assert f"pool {pool_id} is in use by pid {os.getpid()}. End it?" in output.decode()
    assert (journal.read(pool_id) is None) == (answer == "y")


def test_a_record_that_cannot_be_read_is_told() -> None:
    add_pool()
    (journal.data_folder() / "pools" / "ffffffff.json").write_text("{")

    told = subprocess.run([sys.executable, "-m", "skyward.cli", "ps"], check=True, capture_output=True, text=True)

    assert "ffffffff.json can't be read" in told.stderr
    assert len(told.stdout.splitlines()) == 2


def test_a_list_loads_no_more_than_it_needs() -> None:
    code = "import sys, skyward.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()

    assert {"asyncssh", "dask", "distributed", "cryptography"}.isdisjoint(loaded)
