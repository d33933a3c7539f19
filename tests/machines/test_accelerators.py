"""Accelerators of machines reached over SSH: found there, shared out among slots, and missed with both numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import skyward as sky
from tests.cloudbox import Machine
from tests.machines.conftest import IMAGE, Site
from tests.machines.test_bootstrap import Steps, fail_to_start, open_pool


@pytest.fixture(autouse=True)
def _own_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SKYWARD_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def two_neurons(boot: Callable[..., list[Machine]]) -> Iterator[Machine]:
    """A machine with the device files of two Trainium chips."""
    (machine,) = boot(1)
    machine.run("touch /dev/neuron0 /dev/neuron1")
    yield machine
    machine.run("rm -f /dev/neuron0 /dev/neuron1")  # the folder may be the host's


def test_slots_on_other_machines_see_their_share_of_what_is_there(site: Site, two_neurons: Machine) -> None:
    visible = sky.compute(lambda: os.environ["NEURON_RT_VISIBLE_CORES"])()
    steps = Steps()

    with open_pool(site, two_neurons, accelerator="Trainium1:2", concurrency=2, steps=steps) as pool:
        shares = visible @ pool.slots
        info = sky.compute(sky.instance_info)() >> pool

    assert shares == ("0-1", "2-3")
    assert info is not None
    assert (info.accelerator, info.accelerators, info.is_trainium) == ("Trainium1", 2, True)
    assert "gpu" in steps.seen


def test_a_machine_with_fewer_than_promised_is_not_used(site: Site, two_neurons: Machine) -> None:
    error = fail_to_start(site, two_neurons, image=IMAGE, accelerator="Trainium1:4")

    assert error.step == "gpu"
    assert "4 × Trainium1 (32 GB) asked for, 2 there" in str(error)


def test_without_nvidias_driver_it_is_told_what_is_missing(site: Site, two_neurons: Machine) -> None:
    no_driver = fail_to_start(site, two_neurons, image=IMAGE, accelerator="T4")
    no_tool = fail_to_start(
        site, two_neurons, image=IMAGE, accelerator=sky.Accelerator.NVIDIA.A100(mig="3g.40gb")
    )

    assert no_driver.step == "gpu"
    assert "1 × T4 (16 GB) asked for, 0 there; the NVIDIA driver does not answer" in str(no_driver)
    assert no_tool.step == "mig"
    assert "install NVIDIA's driver" in str(no_tool)
