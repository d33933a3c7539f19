"""The command line."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import psutil
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

import skyward as sky
from skyward import paths
from skyward.cleanup import journal
from skyward.cli import main
from skyward.cli.pools import machine_of
from skyward.cli.ssh import ssh_arguments
from skyward.providers.aws import api as aws_api
from skyward.providers.base import Machine
from skyward.version import __version__
from tests.sshhost import Host
from tests.waiting import wait_until

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


@pytest.fixture
def without_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without the extra `aws`, and with credentials that something else uses."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setitem(sys.modules, "boto3", None)
    aws_api._session.cache_clear()


@pytest.mark.usefixtures("without_boto3")
def test_a_cloud_whose_sdk_is_not_installed_is_not_spoken_of() -> None:
    assert skyward("ps").output == "no pools\n"
    assert skyward("down", "--expired").output == "no expired pools\n"


@pytest.mark.usefixtures("without_boto3")
def test_a_missing_sdk_is_reported_if_its_cloud_may_have_a_pool() -> None:
    lacks = "aws could not be asked for pools: sky.AWS needs boto3: pip install 'skyward[aws]'"

    unknown = skyward("down", "cafe0000")
    pool_id = add_pool(provider="aws")
    (entry,) = journal.entries()
    journal.update(entry, places=[journal.Place(provider="aws", region="eu-west-1")])
    listed = skyward("ps")

    assert lacks in unknown.stderr
    assert unknown.exit_code == 2
    assert lacks in listed.stderr
    assert pool_id in listed.stdout


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

    assert result.output == f"pool {pool_id}: shut down on 1 machine\n"
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
    assert all(f"pool {pool_id}: shut down" in result.output for pool_id in expired)


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


@pytest.mark.parametrize("owned", [True, False])
def test_down_keeps_a_pool_whose_owner_was_killed_during_a_launch(owned: bool) -> None:
    pool_id = add_pool(owned=owned)
    entry = journal.read(pool_id)
    assert entry is not None
    journal.update(entry, launching_until=time.time() + 600)

    result = skyward("down", pool_id, "--yes")

    # An owner that still runs launches nothing more once the entry is gone.
    assert (journal.read(pool_id) is None) == owned
    assert result.exit_code == (0 if owned else 1)
    assert owned or "its guardian looks again" in result.stderr


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
    assert f"pool {known}: shut down on 0 machines" in result.stdout


@pytest.mark.parametrize("arguments", [[], ["--all", "--expired"], ["0123abcd", "--all"]])
def test_down_wants_to_know_which_pools(arguments: list[str]) -> None:
    result = skyward("down", *arguments)

    assert result.exit_code == 2
    assert "name pools by their ids" in result.stderr
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
    assert f"pool {pool_id} is in use by pid {os.getpid()}. Shut it down?" in output.decode()
    assert (journal.read(pool_id) is None) == (answer == "y")


def test_down_tells_programs_how_it_went() -> None:
    ended, unknown = add_pool(owned=False), add_pool(provider="nimbus", owned=False)
    entry = journal.read(unknown)
    assert entry is not None
    journal.update(entry, places=[journal.Place(provider="nimbus", region="stratus")])

    result = skyward("down", "--all", "--json")

    assert result.exit_code == 1
    first, second = json.loads(result.stdout)
    assert first == {"pool": ended, "ended": True, "machines": 0, "error": None, "left": []}
    assert (second["pool"], second["ended"], second["left"]) == (unknown, False, [])
    assert "'nimbus'" in second["error"]


def test_a_record_that_cannot_be_read_is_told() -> None:
    add_pool()
    (paths.data_folder() / "pools" / "ffffffff.json").write_text("{")

    told = subprocess.run([sys.executable, "-m", "skyward.cli", "ps"], check=True, capture_output=True, text=True)

    assert "ffffffff.json can't be read" in told.stderr
    assert len(told.stdout.splitlines()) == 2


def test_a_list_loads_no_more_than_it_needs() -> None:
    code = "import sys, skyward.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()

    assert {"asyncssh", "dask", "distributed", "cryptography"}.isdisjoint(loaded)


def test_what_may_well_go_wrong_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> list[journal.Entry]:
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr(journal, "entries", refuse)

    result = skyward("ps", "--here")

    assert result.exit_code == 1
    assert result.output == "Error: [Errno 13] Permission denied: 'x'\n"


# --- pools on this computer ---------------------------------------------------------------------------------


@pytest.fixture
def local() -> Iterator[str]:
    """The id of a pool on this computer that runs."""
    with sky.ComputePool("local", display="quiet"):
        (entry,) = journal.entries()
        yield entry.pool_id
    assert journal.entries() == []


def test_a_pool_on_this_computer_is_listed(local: str) -> None:
    (pool,) = json.loads(skyward("ps", "--here", "--json").output)
    _, line = skyward("ps", "--here").output.splitlines()

    assert (pool["pool"], pool["provider"], pool["state"], pool["machines"]) == (local, "local", "running", [])
    assert pool["owner"]["pid"] == os.getpid()
    assert line.split()[:4] == [local, "local", socket.gethostname(), "running"]


def test_the_dashboard_of_a_pool_on_this_computer_is_there(local: str) -> None:
    result = skyward("dashboard", local, "--no-browser")
    told = json.loads(skyward("dashboard", local, "--no-browser", "--json").output)

    assert told == {"pool": local, "url": result.output.strip()}
    wait_until(lambda: b"Dask" in _page(told["url"]))


def _page(url: str) -> bytes:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as page:
        found: bytes = page.read()
        return found
    return b""


def test_the_log_of_a_pool_on_this_computer_is_its_agents(local: str) -> None:
    entry = journal.read(local)
    assert entry is not None
    with (Path(entry.folder) / "agent.log").open("a") as log:
        log.write("something odd\nand more")

    lines = skyward("logs", local).output.splitlines()
    told = [json.loads(line) for line in skyward("logs", local, "--json").output.splitlines()]
    one = skyward("logs", local, "--node", "0")

    assert lines[-2:] == [f"{socket.gethostname()} agent: something odd", f"{socket.gethostname()} agent: and more"]
    assert told[-1] == {"node": None, "machine": socket.gethostname(), "log": "agent", "line": "and more"}
    assert one.exit_code == 2
    assert "omit --node" in one.stderr


def test_a_pool_on_this_computer_needs_no_login(local: str) -> None:
    result = skyward("ssh", local)

    assert result.exit_code == 1
    assert "runs on this computer" in result.stderr


LOCAL = """
import time
import skyward as sky
with sky.ComputePool("local", nodes=2, display="quiet"):
    print("up", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other() -> Iterator[tuple[subprocess.Popen[str], journal.Entry]]:
    """A process that has a pool on this computer, and what is on record of it."""
    with subprocess.Popen([sys.executable, "-c", LOCAL], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        (entry,) = journal.entries()
        yield process, entry
        process.kill()


def processes_of(pool_id: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("SKYWARD_POOL") == pool_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def test_down_ends_a_pool_on_this_computer(other: tuple[subprocess.Popen[str], journal.Entry]) -> None:
    process, entry = other
    assert processes_of(entry.pool_id)

    result = skyward("down", entry.pool_id, "--yes")

    assert result.output == f"pool {entry.pool_id}: shut down on 0 machines\n"
    assert not Path(entry.folder).exists()
    wait_until(lambda: not processes_of(entry.pool_id))
    assert process.poll() is None


def test_a_pool_on_this_computer_is_not_listed_without_its_owner(
    other: tuple[subprocess.Popen[str], journal.Entry]
) -> None:
    process, entry = other

    process.kill()
    process.wait()

    assert skyward("ps", "--here").output == "no pools\n"
    wait_until(lambda: not processes_of(entry.pool_id))


def test_a_pool_on_another_computer_is_listed_until_its_time_is_over() -> None:
    running, over = add_pool(provider="local"), add_pool(provider="local", expires_in=-1)
    for pool_id in (running, over):
        entry = journal.read(pool_id)
        assert entry is not None
        journal.update(replace(entry, host="elsewhere"))

    (pool,) = json.loads(skyward("ps", "--here", "--json").output)
    ended = skyward("down", running, "--yes")

    assert (pool["pool"], pool["owner"]["alive"]) == (running, None)
    assert ended.exit_code == 1
    assert f"run `skyward down {running}` on it" in ended.stderr


# --- ssh, with the ssh that is installed here ---------------------------------------------------------------

needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="ssh is not installed")


def log_in(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "skyward.cli", "ssh", *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=check)


def pinned(host: Host) -> Machine:
    """Return a machine as a cloud lends it: with a key of the pool's own, and a host key that was made for it."""
    machine = host.machine(key=host.key.export_private_key().decode())
    login = replace(machine.login, host_key=host.known_hosts.read_text().partition(" ")[2], known_hosts=None)
    return replace(machine, login=login)


@linux
@needs_ssh
@pytest.mark.parametrize("is_pinned", [True, False])
def test_ssh_runs_a_command_on_a_machine(host: Host, is_pinned: bool) -> None:
    host.start()
    pool_id = add_pool(pinned(host) if is_pinned else host.machine())

    done = log_in(pool_id, "--", "echo", "$((1 + 1))", "--help")
    failed = log_in(pool_id, host.machine().id, "--", "exit 7", check=False)

    assert done.stdout == "2 --help\n"
    assert failed.returncode == 7


@linux
@needs_ssh
def test_ssh_lets_nobody_else_answer_in_a_machines_place(host: Host, tmp_path: Path) -> None:
    host.start()
    (tmp_path / "other").mkdir()
    stranger = Host(tmp_path / "other").known_hosts.read_text().partition(" ")[2]
    machine = pinned(host)
    pool_id = add_pool(replace(machine, login=replace(machine.login, host_key=stranger)))

    done = log_in(pool_id, "--", "echo", "in", check=False)

    assert (done.returncode, done.stdout) == (255, "")
    assert "Host key verification failed" in done.stderr


def test_ssh_has_no_secret_in_its_command_line_and_leaves_no_file(host: Host, data: Path) -> None:
    pool_id = add_pool(pinned(host))
    entry = journal.read(pool_id)
    assert entry is not None

    arguments = ssh_arguments(entry, machine_of(entry, "0").login, ["ls"])

    files = [Path(a) for a in arguments if a.endswith(".key")] + [data / "pools" / f"{pool_id}.known_hosts"]
    assert "PRIVATE" not in " ".join(arguments)
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600, 0o600]
    journal.close(pool_id)
    assert list((data / "pools").iterdir()) == []


def test_ssh_goes_through_what_leads_to_a_machine(host: Host) -> None:
    machine = host.machine()
    tunnel = ("aws", "ssm", "start-session", "--parameters", "portNumber=22 50%")
    pool_id = add_pool(replace(machine, login=replace(machine.login, proxy_command=tunnel, key=None, known_hosts=None)))
    entry = journal.read(pool_id)
    assert entry is not None

    arguments = ssh_arguments(entry, entry.machines[0].login, [])

    assert "ProxyCommand=aws ssm start-session --parameters 'portNumber=22 50%%'" in arguments
    assert arguments[-1] == "127.0.0.1"


@pytest.mark.parametrize("command", ["ssh", "logs", "dashboard"])
def test_a_pool_that_is_not_there_is_told(command: str) -> None:
    pool_id = add_pool()

    result = skyward(command, f"{pool_id[:-1]}x")

    assert result.exit_code == 2
    assert f"the nearest are {pool_id}" in result.stderr


def test_a_node_that_is_not_there_is_told_with_those_that_are(host: Host) -> None:
    pool_id = add_pool(host.machine())

    result = skyward("ssh", pool_id, "3")
    none = skyward("ssh", add_pool())

    assert result.exit_code == 2
    assert f"has no node '3'; there are 0 ({host.machine().id})" in result.stderr
    assert none.exit_code == 1
    assert "has no machines yet" in none.stderr


def test_a_dashboard_that_is_not_there_yet_is_told(host: Host) -> None:
    result = skyward("dashboard", add_pool(host.machine()))

    assert result.exit_code == 1
    assert "no dashboard yet: its state is 'launching'" in result.stderr


def test_machines_that_cannot_be_asked_for_logs_are_told(host: Host) -> None:
    result = skyward("logs", add_pool(host.machine()))

    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{host.machine().id}: ")
    assert "does not answer over SSH" in line


def test_logs_that_were_kept_of_failed_machines_outlive_their_pool(data: Path) -> None:
    pool_id = add_pool()
    journal.close(pool_id)
    (data / "logs" / pool_id).mkdir(parents=True)
    (data / "logs" / pool_id / "i-0ab3.log").write_text("E: no such package\n")

    result = skyward("logs", pool_id)
    told = json.loads(skyward("logs", pool_id, "--node", "i-0ab3", "--json").output)

    assert result.output == "i-0ab3 kept: E: no such package\n"
    assert told == {"node": None, "machine": "i-0ab3", "log": "kept", "line": "E: no such package"}


# --- completion ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_complete(shell: str) -> None:
    result = skyward("completion", shell)

    assert result.exit_code == 0
    assert f"_SKYWARD_COMPLETE={shell}_complete" in result.output


@pytest.mark.parametrize("command", ["down", "ssh", "logs", "dashboard"])
def test_ids_of_pools_are_completed(command: str) -> None:
    pool_id = add_pool()
    add_pool(owned=False)

    assert complete(command, pool_id[:7]) == [pool_id]


def test_nodes_are_completed(host: Host) -> None:
    pool_id = add_pool(host.machine())
    entry = journal.read(pool_id)
    assert entry is not None
    journal.update(entry, nodes={host.machine().id: 4})

    assert complete("ssh", pool_id, "") == ["4"]


def complete(*words: str) -> list[str]:
    """Return what a shell would offer for the last of `words`."""
    found = ShellComplete(main, {}, "skyward", "_SKYWARD_COMPLETE").get_completions(list(words[:-1]), words[-1])
    return [str(item.value) for item in found]


def test_the_docs_have_every_command_and_option() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")

    for name, command in main.commands.items():
        assert f"`skyward {name}" in page
        for option in (o for p in command.params if isinstance(p, click.Option) for o in p.opts if o.startswith("--")):
            assert option in page, f"{name} {option}"
