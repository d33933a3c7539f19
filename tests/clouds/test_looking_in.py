"""Looking into a pool's machines from the command line: `skyward ssh`, `logs` and `dashboard` on every cloud."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import skyward as sky
from skyward.cleanup import journal
from skyward.cli import main
from tests.clouds.emulated import Emulated
from tests.machines.conftest import IMAGE
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "skyward.cli", *arguments]


def log_in(pool_id: str, *arguments: str) -> str:
    done = subprocess.run(
        command("ssh", pool_id, *arguments), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@sky.compute
def host() -> str:
    import socket

    return socket.gethostname()


def test_machines_are_looked_into(cloud: Emulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = sky.ComputePool(cloud.provider(), machine=cloud.type, nodes=2, image=IMAGE, display="quiet")
    with pool:
        (entry,) = journal.entries()
        pool_id = entry.pool_id
        hosts = host() @ pool

        # ssh
        assert log_in(pool_id, "--", "hostname").strip() == hosts[0]
        assert log_in(pool_id, "1", "--", "hostname").strip() == hosts[1]
        assert log_in(pool_id, pool.instances[1].id, "--", "hostname").strip() == hosts[1]

        # logs
        log_in(pool_id, "1", "--", f"echo 'an agent says' >> /tmp/skyward-{pool_id}/agent.log")
        log_in(pool_id, "0", "--", "echo 'a step failed' >> ~/.cache/skyward/logs/bootstrap.log")
        printed = CliRunner().invoke(main, ["logs", pool_id]).output.splitlines()
        of_one = CliRunner().invoke(main, ["logs", pool_id, "--node", "1"]).output
        assert printed.index("node 0 bootstrap: a step failed") < printed.index("node 1 agent: an agent says")
        assert "node 1 agent: an agent says" in of_one
        assert "node 0" not in of_one

        # logs and dashboard that are kept open, until the pool ends
        with (
            running("logs", pool_id, "--node", "1", "--follow", "--json") as follower,
            running("dashboard", pool_id, "--no-browser") as viewer,
        ):
            told: dict[str, Any] = json.loads(line_of(follower))
            while told["line"] != "an agent says":
                told = json.loads(line_of(follower))
            log_in(pool_id, "1", "--", f"echo 'and more' >> /tmp/skyward-{pool_id}/agent.log")
            more = json.loads(line_of(follower))
            url = line_of(viewer).strip()
            with urllib.request.urlopen(url, timeout=30) as page:
                shown = page.read()
            pool.__exit__(None, None, None)
            statuses = follower.wait(30), viewer.wait(30)

    assert more == {"node": 1, "machine": told["machine"], "log": "agent", "line": "and more"}
    assert url.startswith("http://127.0.0.1:")
    assert b"Dask" in shown
    assert statuses == (0, 0)
    assert list((Path(os.environ["SKYWARD_DATA_DIR"]) / "pools").iterdir()) == []
    assert cloud.left() == []


def test_machines_and_dashboard_are_found_after_a_replacement(
    emulate: Callable[..., Emulated], baked: Path
) -> None:
    cloud = emulate("digitalocean", baked=baked)
    replaced: list[sky.InstanceReplaced] = []

    with sky.ComputePool(cloud.provider(), machine=cloud.type, nodes=2, image=IMAGE, display="quiet") as pool:
        pool.on(sky.InstanceReplaced, replaced.append)
        (entry,) = journal.entries()
        first = log_in(entry.pool_id, "0", "--", "hostname")
        with running("dashboard", entry.pool_id, "--no-browser") as viewer:
            before = line_of(viewer).strip()
            cloud.take_away(pool.instances[0].id)  # it has the scheduler
            after = line_of(viewer).strip()
            with urllib.request.urlopen(after, timeout=30) as page:
                shown = page.read()
        wait_until(lambda: replaced, 90)
        node, instance_id = replaced[0].node, replaced[0].instance_id
        by_number = log_in(entry.pool_id, str(node), "--", "hostname")
        by_id = log_in(entry.pool_id, instance_id, "--", "hostname")
        (listed,) = json.loads(CliRunner().invoke(main, ["ps", "--here", "--json"]).stdout)

    assert before != after
    assert b"Dask" in shown
    assert by_number == by_id != first
    assert {m["node"]: m["id"] for m in listed["machines"]}[node] == instance_id
    assert cloud.left() == []


def test_only_the_computer_that_started_a_pool_has_its_key(
    cloud: Emulated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sky.ComputePool(cloud.provider(), machine=cloud.type, image=IMAGE, display="quiet"):
        (entry,) = journal.entries()
        here = os.environ["SKYWARD_DATA_DIR"]
        monkeypatch.setenv("SKYWARD_DATA_DIR", str(tmp_path / "elsewhere"))
        refused = [CliRunner().invoke(main, [name, entry.pool_id]) for name in ("ssh", "logs", "dashboard")]
        monkeypatch.setenv("SKYWARD_DATA_DIR", here)

    assert [result.exit_code for result in refused] == [1, 1, 1]
    assert all("on another computer, which has the only key" in result.stderr for result in refused)
