"""The machines that other tests run on: they boot, are apart from each other, and leave nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cloudbox import Machine, Network, cloud_config
from tests.waiting import wait_until

STATE = Path("/run/skyward-cloudbox")


def answers(address: str) -> bool:
    try:
        with socket.create_connection((address, 22), timeout=0.3) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False


def traces(name: str) -> list[str]:
    """Return what there is of a network: links, rules, mounts, processes and files."""
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout.splitlines()
    rules = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True).stdout.splitlines()
    mounts = Path("/proc/mounts").read_text().splitlines()
    found = [line for line in (*links, *rules, *mounts) if f"{name}" in line]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
        if f"{STATE / name}/" in command:
            found.append(command)
    return found + [str(p) for p in STATE.glob(f"{name}*")]


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    network = Network()
    yield network
    network.close()


@pytest.fixture(scope="module")
def pair(network: Network) -> Iterator[list[Machine]]:
    machines = [Machine(network, f"box-{i}") for i in range(2)]
    yield machines
    for machine in machines:
        machine.destroy()


def test_a_machine_has_a_name_a_network_and_first_processes_of_its_own(pair: list[Machine]) -> None:
    first, second = pair

    assert first.run("hostname").strip() == "box-0"
    assert first.address in first.run("ip -4 -o address show eth0")
    assert first.run("cat /proc/1/comm").strip() == "sh"
    assert first.processes() == []
    assert first.address != second.address
    assert first.host_key() != second.host_key()


def test_what_a_machine_writes_is_seen_by_no_other(pair: list[Machine]) -> None:
    first, second = pair
    first.run("echo mine > /root/file; echo mine > /etc/only-here; sleep 100 > /dev/null 2>&1 &")

    assert second.run("ls /root/file /etc/only-here 2> /dev/null || true") == ""
    assert not Path("/etc/only-here").exists()
    assert [p.split() for p in first.processes()] == [["sleep", "100"]]
    assert second.processes() == []


def test_a_machine_sees_nothing_of_its_host(pair: list[Machine]) -> None:
    assert pair[0].run("ls -A /root /tmp /run/skyward-cloudbox* 2> /dev/null || true").find("skybox") < 0
    assert str(os.getpid()) not in pair[0].run("ls /proc").split()
    assert pair[0].run(f"ls {Path.cwd()} 2> /dev/null || true") == ""


def test_a_full_packet_passes_whole_between_machines(pair: list[Machine]) -> None:
    sizes = {m.run("cat /sys/class/net/eth0/mtu").strip() for m in pair}
    (host,) = {
        Path(f"/sys/class/net/{p.name}/mtu").read_text().strip()
        for p in Path("/sys/class/net").glob(f"{pair[0].network.name}-*")
    }

    assert sizes == {host}


def test_an_unplugged_machine_is_silent_until_it_is_plugged_in_again(pair: list[Machine]) -> None:
    machine = pair[1]

    machine.unplug()
    assert not answers(machine.address)
    assert machine.is_running
    machine.plug()

    wait_until(lambda: answers(machine.address), 10)


def test_user_data_is_followed(network: Network) -> None:
    key = "ssh-ed25519 AAAA somebody"
    files = [{"path": "/opt/a/b", "content": "it's $HOME\n", "permissions": "0600"}]
    machine = Machine(
        network, "told", cloud_config(ssh_authorized_keys=[key], write_files=files, runcmd=["echo done > /opt/done"]),
        user="ada",
    )  # fmt: skip
    try:
        wait_until(lambda: machine.run("cat /opt/done 2> /dev/null || true") == "done\n", 10)
        assert machine.run("cat /opt/a/b") == "it's $HOME\n"
        assert machine.run("cat /home/ada/.ssh/authorized_keys").strip() == key
        assert machine.run("stat -c '%U %a' /home/ada").split() == ["ada", "700"]
    finally:
        machine.destroy()


@pytest.mark.parametrize("command", ["poweroff", "shutdown -P now"])
def test_a_machine_that_switches_itself_off_is_gone(command: str, network: Network) -> None:
    machine = Machine(network, "short-lived")
    try:
        machine.run(command, check=False)

        wait_until(lambda: not machine.is_running, 10)
        assert not answers(machine.address)
    finally:
        machine.destroy()


def test_the_disk_is_as_large_as_was_asked_for(network: Network) -> None:
    machine = Machine(network, "small", disk="20m")
    try:
        full = machine.run("head -c 30m /dev/zero > /root/big; stat -c %s /root/big", check=False)

        assert 15_000_000 < int(full) <= 20 << 20
    finally:
        machine.destroy()


def test_nothing_is_left_of_machines_and_network(network: Network) -> None:
    mounts = len(Path("/proc/mounts").read_text().splitlines())
    own = Network()
    machine = Machine(own, "box-0")
    machine.run("sleep 1000 > /dev/null 2>&1 &")
    assert traces(own.name)

    machine.destroy()
    machine.destroy()
    own.close()

    wait_until(lambda: traces(own.name) == [], 10)
    assert len(Path("/proc/mounts").read_text().splitlines()) == mounts


def test_what_a_killed_owner_leaves_goes_with_the_next_network() -> None:
    code = """
        import signal
        from tests.cloudbox import Machine, Network
        network = Network()
        machine = Machine(network, "orphan")
        machine.run("sleep 1000 > /dev/null 2>&1 &")
        print(network.name, machine.address, machine.pid, flush=True)
        signal.pause()
    """
    owner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    with owner, owner.stdout:
        name, address, pid = owner.stdout.readline().split()
        assert answers(address)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 10)  # the machine ends with its owner
    assert traces(name)

    following: list[Network] = []
    while not following or following[-1].name < name:
        following.append(Network())  # each takes the lowest number that is free

    assert following[-1].name == name
    own = [t for t in traces(name) if "orphan" in t or f"{name}-" in t]
    for network in following:
        network.close()
    assert own == []
    assert traces(name) == []
