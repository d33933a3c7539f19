"""Ways to hosts, and hosts that can't be had; what a pool's calls find on them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import skyward as sky
from skyward.cluster import ssh
from skyward.providers.base import Login
from skyward.spec.image import Image
from tests.cloudbox import Machine
from tests.machines.conftest import IMAGE, Site
from tests.waiting import wait_until

CONNECT_S = 1.5


@pytest.fixture(autouse=True)
def _own_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYWARD_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of the caller with nothing in it, and no agent."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return home


@pytest.fixture(scope="module")
def pair(boot: Callable[[int], list[Machine]]) -> list[Machine]:
    return boot(2)


def open_pool(provider: sky.SSH, image: Image = IMAGE, **options: Any) -> sky.ComputePool:
    return sky.ComputePool(provider, nodes=len(provider.hosts), image=image, display="quiet", **options)


@sky.compute
def caller_address() -> str:
    """Return from where the machine was logged in to, as the agent was told when it was started."""
    return os.environ["SSH_CONNECTION"].split()[0]


# --- ways to hosts ------------------------------------------------------------------------------------------


def test_names_of_the_ssh_configuration_are_hosts_and_jump_hosts_are_used(
    site: Site, pair: list[Machine], home: Path
) -> None:
    jump, target = pair
    config = f"""
        Host jump
            HostName {jump.address}
            User root
            IdentityFile {site.key}
        Host target
            HostName {target.address}
            Port 22
            User root
            IdentityFile {site.key}
            ProxyJump jump
    """
    (home / ".ssh" / "config").write_text(config)
    shutil.copy(site.known_hosts, home / ".ssh" / "known_hosts")

    with open_pool(sky.SSH("target")) as pool:
        assert caller_address() >> pool == jump.address


@pytest.fixture
def ssh_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    socket = tmp_path / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 10
    while not socket.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
    yield socket
    process.terminate()
    process.wait()


def test_the_keys_of_the_ssh_agent_are_used(site: Site, pair: list[Machine], ssh_agent: Path) -> None:
    subprocess.run(["ssh-add", "-q", str(site.key)], check=True)

    with open_pool(sky.SSH(pair[0].address, user="root", known_hosts=site.known_hosts)) as pool:
        assert caller_address() >> pool == site.network.gateway


# --- what calls find ----------------------------------------------------------------------------------------

ODD = """$(touch /tmp/pwned) `touch /tmp/pwned` 'x' "y" \\n ; touch /tmp/pwned & %s {} * ~ ! #é"""


def test_variables_arrive_to_the_letter_and_those_of_the_pool_come_first(site: Site, pair: list[Machine]) -> None:
    @sky.compute
    def variables() -> dict[str, str]:
        return dict(os.environ)

    image = Image(pip=IMAGE.pip, env={"ODD": ODD, "BOTH": "image", "EMPTY": "", "ONLY_IMAGE": "1"})
    with open_pool(site.provider(pair[0]), image, env={"BOTH": "pool"}) as pool:
        found = variables() >> pool

    assert {name: found[name] for name in ("ODD", "BOTH", "EMPTY", "ONLY_IMAGE")} == {
        "ODD": ODD, "BOTH": "pool", "EMPTY": "", "ONLY_IMAGE": "1",
    }  # fmt: skip
    assert "pwned" not in pair[0].run("ls /tmp")


def test_files_arrive_in_the_working_directory(
    site: Site, pair: list[Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = "$(touch pwned) 'a' \"b\";&.txt"
    here, beside, elsewhere = tmp_path / "here", tmp_path / "beside", tmp_path / "else where"
    for folder in (here / "conf" / "deep", beside, elsewhere / "model"):
        folder.mkdir(parents=True)
    (here / "conf" / "deep" / "a.json").write_text("{}")
    (here / odd).write_text("odd")
    (beside / "b.csv").write_bytes(bytes(range(256)))
    (elsewhere / "model" / "w.bin").write_bytes(b"\0" * 300_000)
    (here / "link").symlink_to(beside / "b.csv")
    monkeypatch.chdir(here)

    @sky.compute
    def files() -> dict[str, int]:
        work = Path.cwd()
        return {str(p.relative_to(work)): p.stat().st_size for p in work.rglob("*") if p.is_file()}

    include = ["conf/deep/a.json", odd, "../beside/b.csv", str(elsewhere / "model"), "link"]
    with open_pool(site.provider(*pair), Image(pip=IMAGE.pip, include=include)) as pool:
        found = files() @ pool

    expected = {"conf/deep/a.json": 2, odd: 3, "b.csv": 256, "model/w.bin": 300_000, "link": 256}
    assert found == (expected, expected)
    assert all(m.run("ls -d /tmp/skyward-* 2> /dev/null || true") == "" for m in pair)


def test_modules_of_an_image_are_imported_once_on_each_machine(
    site: Site, pair: list[Machine], tmp_path: Path
) -> None:
    (tmp_path / "included.py").write_text("import os\nPID = os.getpid()\n")

    @sky.compute
    def where() -> tuple[bool, int, int]:
        return "sklearn.ensemble" in sys.modules, sys.modules["included"].PID, os.getpid()  # type: ignore[attr-defined]

    preload, include = ["sklearn.ensemble", "included"], [str(tmp_path / "included.py")]
    image = Image(pip=IMAGE.pip, include=include, preload=preload)
    with open_pool(site.provider(*pair), image, concurrency=2) as pool:
        found = where() @ pool.slots

    assert all(is_loaded for is_loaded, _, _ in found)
    for node in (found[:2], found[2:]):
        assert len({pid for _, pid, _ in node}) == 1
        assert len({pid for _, *pids in node for pid in pids}) == 3


def test_a_module_that_a_machine_cant_import_fails_the_start(site: Site, pair: list[Machine]) -> None:
    pool = open_pool(site.provider(*pair), Image(pip=IMAGE.pip, preload=["no_such_module"]))

    with pytest.raises(sky.BootstrapError, match=r"no_such_module can't be imported: ModuleNot") as caught, pool:
        pass

    assert "No module named 'no_such_module'" in caught.value.last_lines[-1]
    assert all(m.run("ls -d /tmp/skyward-* 2> /dev/null || true") == "" for m in pair)


def test_include_paths_cannot_be_options_of_the_archiver() -> None:
    with pytest.raises(sky.SpecError, match=r"paths of files and folders"):
        Image(include=["--checkpoint-action=exec=reboot"])


# --- hosts that can't be had --------------------------------------------------------------------------------


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "CONNECT_TIMEOUT_S", CONNECT_S)


def refused(pool: sky.ComputePool, *, beside: Machine) -> sky.BootstrapError:
    """Enter a pool, one host of which can't be had; check that this is soon told and that the other one is clean."""
    started = time.monotonic()
    with pytest.raises(sky.BootstrapError) as caught, pool:
        pass
    assert time.monotonic() - started < CONNECT_S + 6
    assert (caught.value.step, caught.value.status, caught.value.last_lines) == ("ssh", 255, ())
    assert beside.processes() == []
    assert beside.run("ls -d /tmp/skyward-* 2> /dev/null || true") == ""
    return caught.value


def with_bad(site: Site, good: Machine, bad: str, **options: Any) -> sky.ComputePool:
    options = {"key": site.key, "known_hosts": site.known_hosts} | options
    return open_pool(sky.SSH([f"root@{good.address}", bad], **options))


def test_a_host_that_is_not_listening(site: Site, pair: list[Machine]) -> None:
    good, bad = pair

    error = refused(with_bad(site, good, f"root@{bad.address}:2"), beside=good)

    assert error.machine == f"root@{bad.address}:2"
    assert "does not answer over SSH" in str(error)
    assert "Check name, port and firewall" in str(error)


def test_a_host_that_does_not_answer(site: Site, pair: list[Machine], hurried: None) -> None:
    good, bad = pair
    bad.unplug()
    try:
        error = refused(with_bad(site, good, f"root@{bad.address}"), beside=good)
    finally:
        bad.plug()

    assert error.machine == f"root@{bad.address}"
    assert "does not answer over SSH" in str(error)


def test_a_host_whose_name_is_unknown(site: Site, pair: list[Machine], hurried: None) -> None:
    error = refused(with_bad(site, pair[0], "root@nowhere.invalid"), beside=pair[0])

    assert "root@nowhere.invalid does not answer over SSH" in str(error)


def test_a_user_that_is_not_there(site: Site, pair: list[Machine]) -> None:
    error = refused(with_bad(site, pair[0], f"nobody-here@{pair[1].address}"), beside=pair[0])

    assert f"nobody-here@{pair[1].address} refused a login with the key that sky.SSH was given" in str(error)
    assert "give user= and key=" in str(error)


def new_key(path: Path, passphrase: str = "") -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", str(path)], check=True)
    return path


def one_host(site: Site, machine: Machine, **options: Any) -> sky.ComputePool:
    options = {"key": site.key, "known_hosts": site.known_hosts} | options
    return open_pool(sky.SSH(f"root@{machine.address}", **options))


def test_a_key_that_the_host_does_not_know(site: Site, pair: list[Machine], tmp_path: Path) -> None:
    error = refused(one_host(site, pair[0], key=new_key(tmp_path / "other")), beside=pair[0])

    assert "refused a login with the key that sky.SSH was given" in str(error)


def test_no_key_at_all(site: Site, pair: list[Machine]) -> None:
    error = refused(one_host(site, pair[0], key=None), beside=pair[0])

    assert "refused a login with the SSH agent's and the usual keys" in str(error)


def test_a_key_with_a_passphrase(site: Site, pair: list[Machine], tmp_path: Path) -> None:
    error = refused(one_host(site, pair[0], key=new_key(tmp_path / "locked", "secret")), beside=pair[0])

    assert f"the private key {tmp_path / 'locked'} for root@{pair[0].address} can't be read" in str(error)
    assert "to the SSH agent (`ssh-add`)" in str(error)


def test_a_key_file_that_holds_no_key(site: Site, pair: list[Machine], tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("not a key\n")

    error = refused(one_host(site, pair[0], key=tmp_path / "notes"), beside=pair[0])

    assert f"the private key {tmp_path / 'notes'} for root@{pair[0].address} can't be read" in str(error)


@pytest.mark.parametrize("known", ["changed", "unknown"])
def test_a_host_whose_key_is_not_the_known_one(known: str, site: Site, pair: list[Machine], tmp_path: Path) -> None:
    good, bad = pair
    other = " ".join(new_key(tmp_path / "other").with_suffix(".pub").read_text().split()[:2])
    lines = [f"{good.address} {good.host_key()}", f"{bad.address} {other}" if known == "changed" else ""]
    (tmp_path / "known").write_text("\n".join([*lines, ""]))

    error = refused(with_bad(site, good, f"root@{bad.address}", known_hosts=tmp_path / "known"), beside=good)

    assert error.machine == f"root@{bad.address}"
    assert "the host key is not the expected one" in str(error)
    assert f"ssh -o UserKnownHostsFile={tmp_path / 'known'} {bad.address}" in str(error)
    assert "Accepted publickey" not in bad.run("tail -n 1 /var/log/sshd.log")


def test_a_host_is_not_trusted_because_nothing_is_known_about_any(site: Site, pair: list[Machine]) -> None:
    error = refused(one_host(site, pair[0], known_hosts=None), beside=pair[0])

    assert "~/.ssh/known_hosts has none or another one for it" in str(error)


def test_a_configuration_that_switches_the_check_off_is_refused(site: Site, pair: list[Machine], home: Path) -> None:
    (home / ".ssh" / "config").write_text("Host *\n  StrictHostKeyChecking no\n  UserKnownHostsFile none\n")

    error = refused(one_host(site, pair[0], known_hosts=None), beside=pair[0])

    assert "UserKnownHostsFile" in str(error)
    assert "give known_hosts= to sky.SSH" in str(error)


def test_a_pinned_key_keeps_an_impostor_out(site: Site, pair: list[Machine], tmp_path: Path) -> None:
    other = " ".join(new_key(tmp_path / "other").with_suffix(".pub").read_text().split()[:2])

    async def connect(host_key: str) -> None:
        link = ssh.Link(Login(host=pair[0].address, user="root", key=str(site.key), host_key=host_key))
        try:
            await link.connect()
        finally:
            await link.close()

    asyncio.run(connect(pair[0].host_key()))
    with pytest.raises(sky.BootstrapError, match="Somebody else may be answering in its place"):
        asyncio.run(connect(other))


_TO_PORT_22 = """
import os, socket, sys, threading

there = socket.create_connection((sys.argv[1], 22))

def send():
    while data := os.read(0, 65536):
        there.sendall(data)

threading.Thread(target=send, daemon=True).start()
while data := there.recv(65536):
    os.write(1, data)
"""


def test_a_proxy_command_leads_to_a_machine_without_an_address(pair: list[Machine], site: Site) -> None:
    login = Login(
        host="i-0ab1", port=22, user="root", key=str(site.key), host_key=pair[0].host_key(),
        proxy_command=(sys.executable, "-c", _TO_PORT_22, pair[0].address),
    )  # fmt: skip

    async def name() -> str:
        link = ssh.Link(login)
        try:
            return (await link.run("hostname")).output.strip()
        finally:
            await link.close()
            assert all(p.returncode is not None for p in link._proxies)  # or they would outlive the event loop

    assert asyncio.run(name()) == pair[0].name


def test_the_error_survives_pickling_with_its_facts(site: Site, pair: list[Machine]) -> None:
    import pickle

    error = refused(one_host(site, pair[0], key=None), beside=pair[0])

    again = pickle.loads(pickle.dumps(error))
    assert json.dumps(vars(again)) == json.dumps(vars(error))
    assert str(again) == str(error)


# --- one host under two names -------------------------------------------------------------------------------


def test_a_host_under_two_names_is_refused_with_both(site: Site, pair: list[Machine], sshds: dict[str, str]) -> None:
    names = [f"root@{pair[0].address}", sshds["tcp"]]

    with pytest.raises(sky.BootstrapError, match="this is the same host under another name") as caught:
        open_pool(sky.SSH(names, key=site.key, known_hosts=site.known_hosts)).__enter__()

    assert all(name in str(caught.value) for name in names)
    assert pair[0].processes() == []
    assert pair[0].run("ls -d /tmp/skyward-* 2> /dev/null || true") == ""


def test_a_second_name_of_a_host_does_not_end_what_runs_on_it(
    site: Site, pair: list[Machine], sshds: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"root@{pair[0].address}", sshds["tcp"]]
    provider = sky.SSH(names, key=site.key, known_hosts=site.known_hosts)

    with sky.ComputePool(provider, nodes=1, image=IMAGE, display="quiet") as pool:
        pool.scale(2)
        wait_until(lambda: "this is the same host under another name" in caplog.text)
        found = caller_address() >> pool

    assert found == site.network.gateway


# --- what sshd forbids --------------------------------------------------------------------------------------

SSHDS = {
    "tcp": ["AllowTcpForwarding no"],
    "sockets": ["AllowStreamLocalForwarding no"],
    "all": ["DisableForwarding yes"],
    "targets": ["PermitOpen none"],
    "sessions": ["MaxSessions 1"],
    "all but one session": ["DisableForwarding yes", "MaxSessions 1"],
    "every session": ["MaxSessions 0"],
}


@pytest.fixture(scope="module")
def sshds(site: Site, pair: list[Machine]) -> dict[str, str]:
    """Hosts as sky.SSH takes them, each with an sshd that forbids something."""
    machine, hosts = pair[0], {}
    for port, (forbidden, settings) in enumerate(SSHDS.items(), 2201):
        options = "".join(f" -o '{setting}'" for setting in settings)
        machine.run(f"/usr/sbin/sshd -f /etc/ssh/sshd_config -E /var/log/sshd.log -o Port={port}{options}")
        with site.known_hosts.open("a") as known:
            known.write(f"[{machine.address}]:{port} {machine.host_key()}\n")
        hosts[forbidden] = f"root@{machine.address}:{port}"
    return hosts


@pytest.mark.parametrize("forbidden", [f for f in SSHDS if f != "every session"])
def test_a_pool_runs_whatever_forwarding_sshd_forbids(forbidden: str, site: Site, sshds: dict[str, str]) -> None:
    @sky.compute
    def size(data: bytes) -> int:
        return len(data)

    provider = sky.SSH(sshds[forbidden], key=site.key, known_hosts=site.known_hosts)
    with open_pool(provider, concurrency=2) as pool:
        sizes = sky.gather(*(size(bytes([n]) * 3_000_000) for n in range(4))) >> pool
        with urllib.request.urlopen(pool.dashboard_link.replace("status", "health"), timeout=30) as page:
            health = page.read()

    assert sizes == (3_000_000,) * 4
    assert health == b"ok"


def test_an_sshd_without_sessions_is_named_with_the_setting(
    site: Site, pair: list[Machine], sshds: dict[str, str]
) -> None:
    provider = sky.SSH(sshds["every session"], key=site.key, known_hosts=site.known_hosts)

    error = refused(open_pool(provider), beside=pair[0])

    assert f"{sshds['every session']} can be logged in to, but its sshd refuses to run commands" in str(error)
    assert "Set MaxSessions in its sshd_config" in str(error)


def test_a_stream_through_a_session_is_made_again_when_it_breaks(
    site: Site, pair: list[Machine], sshds: dict[str, str]
) -> None:
    @sky.compute
    def meet(here: str, there: str) -> str:
        Path(here).touch()
        while not Path(there).exists():
            time.sleep(0.05)
        return "met"

    provider = sky.SSH(sshds["all"], key=site.key, known_hosts=site.known_hosts)
    with open_pool(provider) as pool:
        call = pool.submit(meet("/tmp/here", "/tmp/there"))
        pair[0].run("until [ -e /tmp/here ]; do sleep 0.05; done; pkill -f '[s]shd: root'; touch /tmp/there")
        assert call.result(timeout=60) == "met"
