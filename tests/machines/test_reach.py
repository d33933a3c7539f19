"""Hosts that don't reach each other, or not at the addresses that they are logged in to by."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import skyward as sky
from tests.cloudbox import Machine
from tests.cloudbox.network import run
from tests.machines.conftest import IMAGE, Site


@pytest.fixture(autouse=True)
def _own_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYWARD_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def machines(boot: Callable[[int], list[Machine]]) -> list[Machine]:
    return boot(3)


@sky.compute
def own_address() -> str:
    from distributed import get_worker

    return str(get_worker().address).removeprefix("tls://").rpartition(":")[0]


def open_pool(provider: sky.SSH) -> sky.ComputePool:
    return sky.ComputePool(provider, nodes=len(provider.hosts), image=IMAGE, display="quiet")


@contextlib.contextmanager
def wall(machine: Machine, *, against: str = "0.0.0.0/0", rule: str = "reject with tcp reset") -> Iterator[None]:
    """A firewall on a machine that lets in nothing but SSH from outside."""
    machine.run(f"""nft -f - <<END
        table ip wall {{
            chain into {{
                type filter hook input priority 0;
                iifname lo accept
                ct state established,related accept
                tcp dport 22 accept
                ip saddr {against} meta l4proto tcp {rule}
            }}
        }}
END""")
    try:
        yield
    finally:
        machine.run("nft delete table ip wall")


def refused(provider: sky.SSH) -> str:
    with pytest.raises(sky.BootstrapError) as caught, open_pool(provider):
        pass
    assert "Let all TCP ports through between the nodes" in str(caught.value)
    assert "sky.SSH(addresses=...)" in str(caught.value)
    return str(caught.value)


def test_a_node_that_does_not_reach_the_scheduler_is_told_at_once(site: Site, machines: list[Machine]) -> None:
    first, second, _ = machines

    with wall(first, rule="drop"):
        error = refused(site.provider(first, second))

    there = rf"tls://{re.escape(first.address)}:\d+"
    assert re.search(rf"node 1 at {second.address} can't reach the scheduler's node, at {there}: ", error)


def test_a_node_that_the_scheduler_does_not_reach_is_told_at_once(site: Site, machines: list[Machine]) -> None:
    first, second, _ = machines

    with wall(second):
        error = refused(site.provider(first, second))

    assert re.search(rf"can't reach node 1 at {second.address}, port \d+: Connection refused", error)
    assert f"the scheduler's node, at tls://{first.address}:" in error


def test_nodes_that_do_not_reach_each_other_are_told_at_once(site: Site, machines: list[Machine]) -> None:
    _, second, third = machines

    with wall(second, against=third.address), wall(third, against=second.address):
        error = refused(site.provider(*machines))

    pair = [(1, second.address), (2, third.address)]
    ways = [f"node {a} at {here} can't reach node {b} at {there}, port" for (a, here), (b, there) in (pair, pair[::-1])]
    assert any(way in error for way in ways)


_FORWARD = """
import asyncio

async def pump(reader, writer):
    while data := await reader.read(1 << 16):
        writer.write(data)
    writer.close()

async def accept(reader, writer):
    there_reader, there_writer = await asyncio.open_connection("127.0.0.1", 22)
    await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer), return_exceptions=True)

async def main():
    async with await asyncio.start_server(accept, "0.0.0.0", 2222) as server:
        await server.serve_forever()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def hidden(site: Site, machines: list[Machine]) -> sky.SSH:
    """Hosts behind forwarded ports: on each, logins seem to come from itself, at its loopback address."""
    pair = machines[:2]
    for machine in pair:
        machine.run(f"python3 -c '{_FORWARD}' > /dev/null 2>&1 < /dev/null &")
        machine.run("until ss -ltn | grep -q :2222; do sleep 0.05; done")
        with site.known_hosts.open("a") as known:
            known.write(f"[{machine.address}]:2222 {machine.host_key()}\n")
    return sky.SSH([f"root@{m.address}:2222" for m in pair], key=site.key, known_hosts=site.known_hosts)


def test_hosts_reach_each_other_at_the_addresses_that_are_asked_for(
    site: Site, machines: list[Machine], hidden: sky.SSH
) -> None:
    networks = ["192.0.2.0/24", str(site.network.subnet)]
    provider = sky.SSH(hidden.hosts, key=site.key, known_hosts=site.known_hosts, addresses=networks)

    with open_pool(provider) as pool:
        found = own_address() @ pool

    assert found == tuple(m.address for m in machines[:2])


def test_a_host_that_has_no_such_address_is_told_with_those_it_has(site: Site, machines: list[Machine]) -> None:
    provider = sky.SSH(
        f"root@{machines[0].address}", key=site.key, known_hosts=site.known_hosts, addresses="192.0.2.0/24"
    )

    with pytest.raises(sky.BootstrapError) as caught, open_pool(provider):
        pass

    assert re.search(rf"none of the host's addresses \(.*{machines[0].address}.*\) is in", str(caught.value))
    assert "sky.SSH(addresses=['192.0.2.0/24'])" in str(caught.value)


def test_hosts_are_reached_at_ipv6_addresses(site: Site, machines: list[Machine]) -> None:
    prefix = f"fd77:{site.network.subnet.network_address.packed[2] + 1:x}::"  # fd77:0:: would not be the usual form
    run("ip", "address", "add", f"{prefix}1/64", "dev", site.network.name, "nodad")
    addresses = [f"{prefix}{number}" for number in (2, 3)]
    for machine, address in zip(machines, addresses, strict=False):
        machine.run(f"ip address add {address}/64 dev eth0 nodad")
        with site.known_hosts.open("a") as known:
            known.write(f"{address} {machine.host_key()}\n")
    hosts = [f"root@{addresses[0]}", f"root@[{addresses[1]}]:22"]

    with open_pool(sky.SSH(hosts, key=site.key, known_hosts=site.known_hosts)) as pool:
        found = own_address() @ pool
        told = [instance.private_ip for instance in pool.instances]

    assert found == tuple(f"[{address}]" for address in addresses)
    assert told == addresses
