"""Looking into hosts that stay, from the command line, with the keys that sky.SSH was given."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import skyward as sky
from skyward.cleanup import journal
from skyward.cli import main
from tests.cloudbox import Machine
from tests.machines.conftest import IMAGE, Site


@pytest.fixture(autouse=True)
def _own_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYWARD_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def machines(boot: Callable[[int], list[Machine]]) -> list[Machine]:
    return boot(2)


@pytest.fixture
def pool_id(site: Site, machines: list[Machine], _own_journal: None) -> Iterator[str]:
    with sky.ComputePool(site.provider(*machines), nodes=2, image=IMAGE, display="quiet"):
        (entry,) = journal.entries()
        yield entry.pool_id


def skyward(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_ps_says_which_host_is_which_node(pool_id: str, machines: list[Machine]) -> None:
    (pool,) = json.loads(skyward("ps", "--here", "--json").output)

    assert [(m["node"], m["host"]) for m in pool["machines"]] == [(n, m.address) for n, m in enumerate(machines)]


def test_ssh_uses_the_keys_that_the_pool_uses(pool_id: str, machines: list[Machine]) -> None:
    command = [sys.executable, "-m", "skyward.cli", "ssh", pool_id, "1", "--", "hostname; tty"]

    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)

    assert done.stdout.splitlines() == [machines[1].name, "not a tty"], done.stderr


def test_logs_are_read_side_by_side_and_printed_in_order(pool_id: str, machines: list[Machine]) -> None:
    for number, machine in enumerate(machines):
        machine.run(f"echo 'agent {number} says' >> /tmp/skyward-{pool_id}/agent.log")

    result = skyward("logs", pool_id)

    said = [line for line in result.output.splitlines() if line.endswith("says")]
    assert said == ["node 0 agent: agent 0 says", "node 1 agent: agent 1 says"]
    assert result.exit_code == 0


def test_a_log_is_followed_over_a_connection_that_breaks(pool_id: str, machines: list[Machine]) -> None:
    log = f"/tmp/skyward-{pool_id}/agent.log"
    machines[1].run(f"echo before >> {log}")
    command = [sys.executable, "-m", "skyward.cli", "logs", pool_id, "--node", "1", "-f"]

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        while follower.stdout.readline() != "node 1 agent: before\n":
            assert follower.poll() is None
        # The sessions of both: the pool's is made again, and so is this.
        machines[1].run("pkill -f '[s]shd: root'")
        machines[1].run(f"echo after >> {log}")
        after = follower.stdout.readline()
        follower.send_signal(2)
        status = follower.wait(30)

    assert after == "node 1 agent: after\n"
    assert status == 0


def test_the_dashboard_is_reached_through_a_tunnel_until_ctrl_c(pool_id: str) -> None:
    command = [sys.executable, "-m", "skyward.cli", "dashboard", pool_id, "--no-browser", "--json"]

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as viewer:
        assert viewer.stdout is not None
        told = json.loads(viewer.stdout.readline())
        with urllib.request.urlopen(told["url"], timeout=30) as page:
            shown = page.read()
        viewer.send_signal(2)
        _, error = viewer.communicate(timeout=30)

    assert told["pool"] == pool_id
    assert b"Dask" in shown
    assert (viewer.returncode, error) == (0, "")
