"""What machines of clouds are told at boot, read by cloud-init itself. It is installed in the box alone."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from skyward.cluster.ssh import Link
from skyward.launch.provisioner import pool_keys
from skyward.providers.base import UserData
from tests.cloudbox import Machine
from tests.machines.conftest import Site
from tests.waiting import wait_until

TTL_S = 4321
_INSTALL = """
apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -qy -o Dpkg::Options::=--force-unsafe-io \
    install --no-install-recommends cloud-init > /dev/null || exit
# The box has no locale but C.UTF-8, and no other source of user-data.
printf 'locale: C.UTF-8\\ndatasource_list: [NoCloud]\\n' > /etc/cloud/cloud.cfg.d/99-box.cfg
"""


class Guest:
    """A machine with cloud-init, which is run as systemd does when a machine boots."""

    def __init__(self, machine: Machine, user_data: Callable[[UserData], str]) -> None:
        login, birth = pool_keys(TTL_S)
        self.machine = machine
        self._login = replace(login, host=machine.address)
        self._root = Path(f"/proc/{machine.pid}/root")
        self.shut_down()
        machine.run("cloud-init clean --logs; rm -rf /root/.ssh /var/lib/cloud/scripts/per-boot/*")
        seed = self._root / "var/lib/cloud/seed/nocloud"
        seed.mkdir(parents=True, exist_ok=True)
        (seed / "meta-data").write_text("instance-id: i-0123\n")
        (seed / "user-data").write_text(user_data(birth))

    def boot(self, *stages: str) -> None:
        """Run the stages of a boot; sshd starts after the second, with Debian's own configuration."""
        for stage in stages or ("init --local", "init", "modules --mode=config", "modules --mode=final"):
            self.machine.run(f"cloud-init {stage}")
            if stage == "init":
                self.machine.run("pkill -o -x sshd; /usr/sbin/sshd -f /usr/share/openssh/sshd_config")

    def shut_down(self) -> None:
        """End what a shutdown ends, but for the machine itself."""
        self.machine.run(f"pkill -f '^sh -c sleep {TTL_S}'; pkill -x sleep; rm -rf /run/cloud-init")

    def log_in(self, command: str) -> str:
        """Run a command over SSH, as a pool does; the host key is pinned."""

        async def run() -> str:
            link = Link(self._login)
            try:
                await link.connect()
                return (await link.run(command)).output
            finally:
                await link.close()

        return asyncio.run(run())

    @property
    def timers(self) -> list[str]:
        """The timers that will switch the machine off."""
        return [line for line in self.machine.processes() if line == f"sleep {TTL_S}"]

    def complaints(self) -> list[str]:
        """Return errors and warnings of cloud-init."""
        report = json.loads((self._root / "run/cloud-init/result.json").read_text())
        log = (self._root / "var/log/cloud-init.log").read_text()
        return [*report["v1"]["errors"], *re.findall(r".*\[(?:WARNING|ERROR)\].*", log)]


@pytest.fixture(scope="module")
def installed(site: Site) -> Iterator[Machine]:
    (machine,) = site.boot()
    try:
        machine.run(_INSTALL)
    except RuntimeError as exc:
        machine.destroy()
        pytest.skip(f"cloud-init can't be installed in a box here: {exc}")
    yield machine
    machine.destroy()


@pytest.fixture
def user_data() -> Callable[[UserData], str]:
    """What the machines of AWS and DigitalOcean are told."""
    return UserData.cloud_config


@pytest.fixture
def guest(installed: Machine, user_data: Callable[[UserData], str]) -> Guest:
    return Guest(installed, user_data)


both = pytest.mark.parametrize("user_data", [UserData.cloud_config, UserData.script], ids=["cloud-config", "script"])
"""AWS and DigitalOcean pass the first to cloud-init, Verda the second."""


def test_cloud_init_has_nothing_to_say_against_the_user_data(guest: Guest) -> None:
    said = guest.machine.run("cloud-init schema --config-file /var/lib/cloud/seed/nocloud/user-data 2>&1")

    assert said.strip() == "Valid cloud-config: /var/lib/cloud/seed/nocloud/user-data"


@both
def test_root_logs_in_with_the_keys_that_were_given(guest: Guest) -> None:
    guest.boot()

    assert guest.log_in("id -un") == "root\n"
    assert guest.complaints() == []


def test_the_timer_is_armed_before_anything_is_installed(guest: Guest) -> None:
    guest.boot("init --local", "init")

    assert len(guest.timers) == 1


@both
def test_a_machine_that_reboots_is_armed_once_again(guest: Guest) -> None:
    guest.boot()
    first = guest.timers
    guest.shut_down()
    guest.boot()

    assert (len(first), len(guest.timers)) == (1, 1)


def test_a_machine_switches_itself_off_when_its_time_is_up(guest: Guest) -> None:
    guest.boot("init --local", "init")

    guest.machine.run("rm -f /run/off; printf '#!/bin/sh\\ntouch /run/off\\n' > /usr/sbin/poweroff; pkill -x sleep")

    wait_until(lambda: guest.machine.run("ls /run/off 2> /dev/null || true"), 10)
