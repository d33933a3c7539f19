"""Machines in a box for these tests, with an environment that is made once and then shown to all of them."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import skyward as sky
from skyward.cluster.requirements import recipe
from skyward.cluster.wheel import own_wheel
from skyward.spec.image import Image
from tests.cloudbox import Machine, Network, cloud_config, why_not

IMAGE = Image(pip=["numpy", "scikit-learn"])
"""What the machines of these tests have an environment for, so that a pool on them starts in a second."""
_BAKED = Path("/run/skyward-cloudbox-baked")


@dataclass
class Site:
    """A network, a key, and the machines that let it in."""

    network: Network
    folder: Path
    machines: list[Machine] = field(default_factory=list)

    @property
    def key(self) -> Path:
        return self.folder / "key"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    def boot(self, count: int = 1, **options: Any) -> list[Machine]:
        """Boot machines that let the site's key in; their host keys become known."""
        user_data = cloud_config(ssh_authorized_keys=[self.key.with_suffix(".pub").read_text()])
        booted = []
        for _ in range(count):
            name = f"box-{len(self.machines)}"
            machine = Machine(self.network, name, user_data, **options)
            self.machines.append(machine)
            booted.append(machine)
            with self.known_hosts.open("a") as known:
                known.write(f"{machine.address} {machine.host_key()}\n")
        return booted

    def provider(self, *machines: Machine) -> sky.SSH:
        """Return the provider that lends `machines`."""
        hosts = [f"{m.user}@{m.address}" for m in machines]
        return sky.SSH(hosts, key=self.key, known_hosts=self.known_hosts)

    def close(self) -> None:
        for machine in self.machines:
            machine.destroy()
        self.network.close()


@pytest.fixture(scope="session")
def can_boot() -> None:
    """Skips where machines can't be booted that have the Python of this test run."""
    if reason := why_not():
        pytest.skip(reason)
    here = "{}.{}".format(*sys.version_info)
    there = subprocess.run(["/usr/bin/python3", "-V"], capture_output=True, text=True).stdout.split()[-1]
    if not there.startswith(f"{here}."):
        pytest.skip(f"machines in a box have this host's Python {there}, and no way to get {here}, which is needed")


@pytest.fixture(autouse=True)
def _only_where_machines_boot(can_boot: None) -> None:
    pass


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def site(can_boot: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The network and key of this test run. Whoever boots machines on it destroys them."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")], check=True)
    site = Site(Network(), folder)
    yield site
    site.close()


@pytest.fixture(scope="session")
def baked(site: Site) -> Path:
    """A folder that holds the environment for `IMAGE`, made on a machine when there is none yet for this code."""
    wheel = own_wheel()
    key = recipe(IMAGE, wheel).key
    folder = _BAKED / key
    _BAKED.mkdir(exist_ok=True)
    with (_BAKED / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker of this test run may be at it
        if not folder.exists():
            (machine,) = site.boot()
            with sky.ComputePool(site.provider(machine), image=IMAGE, display="quiet"):
                pass
            part = _BAKED / f"{key}.part"
            shutil.copytree(f"/proc/{machine.pid}/root/root/.cache/skyward", part, symlinks=True)
            part.rename(folder)
            machine.destroy()
    return folder


@pytest.fixture(scope="module")
def boot(site: Site, baked: Path) -> Iterator[Callable[..., list[Machine]]]:
    """Boots so many machines with the environment for `IMAGE`, for the tests of one file."""
    booted: list[Machine] = []

    def boot(count: int, **options: Any) -> list[Machine]:
        machines = site.boot(count, baked=baked, **options)
        booted.extend(machines)
        return machines

    yield boot
    for machine in booted:
        machine.destroy()
