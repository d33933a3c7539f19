"""Hosts that share a home, as over NFS: their locks with flock do not exclude each other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import skyward as sky
from tests.cloudbox import Machine
from tests.machines.conftest import IMAGE, Site


@pytest.fixture(autouse=True)
def _own_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYWARD_DATA_DIR", str(tmp_path / "data"))


@sky.compute
def node() -> int:
    return sky.instance_info().node


def flock_that_ends_with(status: int, machine: Machine) -> None:
    machine.run(f"printf '#!/bin/sh\\nexit {status}\\n' > /usr/local/bin/flock; chmod 755 /usr/local/bin/flock")


def test_hosts_that_share_a_home_make_its_environment_once(site: Site, baked: Path, tmp_path: Path) -> None:
    cache = tmp_path / "home" / ".cache" / "skyward"
    shutil.copytree(baked / "uv-cache", cache / "uv-cache", symlinks=True)  # it saves the downloads
    machines = site.boot(3, shared=tmp_path / "home")
    try:
        for machine, status in zip(machines, (0, 0, 71), strict=True):  # does nothing, or fails as with ENOLCK
            flock_that_ends_with(status, machine)

        with sky.ComputePool(site.provider(*machines), nodes=3, image=IMAGE, display="quiet") as pool:
            assert sorted(node() @ pool) == [0, 1, 2]

        found = {path.name for folder in ("envs", "skyward", "wheels") for path in (cache / folder).iterdir()}
        assert len(found) == 2
        assert not (cache / "lock.d").exists()
    finally:
        for machine in machines:
            machine.destroy()
