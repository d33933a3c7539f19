"""What a stranger finds on the machines of a pool, and what is kept from its owner's screen."""

from __future__ import annotations

import datetime
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from distributed import Client

import skyward as sky
from skyward.node.tls import make_credentials
from tests.cloudbox import Machine
from tests.machines.conftest import IMAGE, Site


@pytest.fixture(scope="module")
def machines(boot: Callable[[int], list[Machine]]) -> list[Machine]:
    return boot(2)


@pytest.fixture(scope="module")
def events() -> list[Any]:
    return []


@pytest.fixture(scope="module")
def pool(site: Site, machines: list[Machine], events: list[Any]) -> Iterator[sky.ComputePool]:
    provider = site.provider(*machines)
    with sky.ComputePool(
        provider, nodes=2, image=IMAGE, env={"TOKEN": "hunter2"}, on_event=events.append, display="quiet"
    ) as pool:
        yield pool


def open_ports(machine: Machine) -> list[int]:
    """Return the ports on which the machine listens to others than itself."""
    addresses = [line.split()[3] for line in machine.run("ss -Hltn").splitlines()]
    return sorted({int(a.rpartition(":")[2]) for a in addresses if not a.startswith(("127.", "[::1]"))})


def is_let_in(connection: socket.socket, context: ssl.SSLContext) -> bool:
    """Tell whether a stranger without a certificate gets more than a refusal from a port that has to speak TLS."""
    try:
        stranger = context.wrap_socket(connection)  # fails where something else is spoken
    except (ssl.SSLEOFError, ConnectionError):
        return False  # closed at once: nodes find out at such a port whether they reach each other
    with stranger:
        stranger.settimeout(10)
        try:
            stranger.sendall(b"hello")
            return stranger.recv(1) != b""
        except (ssl.SSLError, ConnectionError):  # TLS 1.3 refuses after the handshake, at the first read
            return False


def test_others_find_only_ssh_and_ports_that_want_a_certificate(pool: sky.ComputePool, machines: list[Machine]) -> None:
    assert pool.is_active
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE

    for machine in machines:
        ports = open_ports(machine)
        assert 22 in ports
        assert len(ports) >= 3  # worker and nanny
        for port in ports:
            with socket.create_connection((machine.address, port), timeout=10) as plain:
                if port == 22:
                    assert plain.recv(4) == b"SSH-"
                    continue
                assert not is_let_in(plain, context), f"port {port} of {machine.name}"


def test_certificates_hold_on_machines_whose_clocks_are_hours_apart() -> None:
    made = make_credentials("somepool", lifetime_s=3600)
    day, now = datetime.timedelta(hours=25), datetime.datetime.now(datetime.UTC)

    for pem in (made.ca, made.certificate):
        certificate = x509.load_pem_x509_certificate(pem.encode())
        assert certificate.not_valid_before_utc < now - day
        assert certificate.not_valid_after_utc > now + datetime.timedelta(hours=1) + day


def test_a_client_with_another_pools_certificate_is_refused(pool: sky.ComputePool) -> None:
    other = make_credentials("otherpool", lifetime_s=60).security()
    address = pool.cluster.scheduler_address

    with pytest.raises(OSError, match=r"certificate|alert|closed|Timed out"):
        Client(address, security=other, timeout="3s")


def test_the_dashboard_is_reached_through_the_tunnel_only(pool: sky.ComputePool, machines: list[Machine]) -> None:
    import urllib.request

    assert pool.dashboard_link.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(pool.dashboard_link, timeout=20) as page:
        assert page.status == 200
    assert "8787" not in map(str, open_ports(machines[0]))


def test_what_the_pool_has_on_a_machine_is_for_its_user_only(pool: sky.ComputePool, machines: list[Machine]) -> None:
    assert pool.is_active
    for machine in machines:
        readable = machine.run("find /tmp/skyward-* ~/.cache/skyward/logs ! -type l -perm /077")
        keys = machine.run("grep -rslE 'BEGIN (EC |RSA )?PRIVATE KEY' /tmp /root/.cache/skyward/logs; true")

        assert readable == ""
        assert keys == ""


def test_no_secret_is_on_a_command_line(pool: sky.ComputePool, machines: list[Machine]) -> None:
    assert pool.is_active
    for machine in machines:
        shown = machine.run("ps -ww -eo args")

        assert "hunter2" not in shown
        assert "PRIVATE" not in shown


def test_no_secret_is_in_logs_events_or_repr(
    pool: sky.ComputePool, machines: list[Machine], events: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    sky.compute(socket.gethostname)() @ pool
    shown = [repr(events), repr(pool), repr(pool.spec), repr(pool.provider), repr(pool.cluster), caplog.text]
    for machine in machines:
        shown.append(machine.run("cat /tmp/skyward-*/*.log /root/.cache/skyward/logs/*"))

    assert events
    for text in shown:
        assert "hunter2" not in text
        assert "PRIVATE" not in text


def test_the_journal_is_for_its_user_only(
    site: Site, machines: list[Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKYWARD_DATA_DIR", str(tmp_path / "data"))

    with sky.ComputePool(site.provider(machines[0]), image=IMAGE, display="quiet"):
        files = list((tmp_path / "data" / "pools").iterdir())
        modes = {path.stat().st_mode & 0o777 for path in files}
        texts = [path.read_text() for path in files]

    assert modes == {0o600}
    assert not any("PRIVATE" in text for text in texts)
    assert not list((tmp_path / "data" / "pools").iterdir())
