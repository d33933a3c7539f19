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


_TOOL = r"""#!/bin/sh
echo "$*" >> /root/nvidia-smi.log
case "$*" in
    -L) echo "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-0)"
        awk '{ print "  MIG " $1 "  Device " NR - 1 ": (UUID: MIG-" NR - 1 ")" }' /root/parts ;;
    *mig.mode.current*) echo Enabled ;;
    *-cgi*) echo "$5" | tr , '\n' | cut -d: -f1 > /root/parts ;;
esac
"""
_LIBRARY = """
from types import SimpleNamespace as _Facts
NVML_DEVICE_MIG_ENABLE = 1
class NVMLError(Exception): pass
class NVMLError_NotFound(NVMLError): pass
nvmlInit = nvmlShutdown = lambda: None
nvmlDeviceGetCount = lambda: 1
nvmlDeviceGetHandleByIndex = lambda i: ("GPU-0", "NVIDIA A100-SXM4-80GB")
nvmlDeviceGetUUID = lambda handle: handle[0]
nvmlDeviceGetName = lambda handle: handle[1]
nvmlDeviceGetMemoryInfo = lambda handle: _Facts(total=85_899_345_920)
nvmlDeviceGetMigMode = lambda handle: [1, 1]
nvmlDeviceGetMaxMigDeviceCount = lambda handle: 7
def nvmlDeviceGetMigDeviceHandleByIndex(handle, i):
    parts = open("/root/parts").read().split()
    if i >= len(parts):
        raise NVMLError_NotFound
    return f"MIG-{i}", f"NVIDIA A100-SXM4-80GB MIG {parts[i]}"
"""


def test_a_machines_gpu_is_partitioned_once_and_each_partition_is_a_worker(site: Site, two_neurons: Machine) -> None:
    """With stand-ins for NVIDIA's tool and library, which keep the partitions in a file."""
    machine, accelerator = two_neurons, sky.Accelerator.NVIDIA.A100(mig=["2g.20gb", "3g.40gb"])
    fail_to_start(site, machine, accelerator="T4")  # so that the environment is there, to put the library into
    machine.run(f"touch /root/parts; cat > /usr/local/bin/nvidia-smi <<'EOF'\n{_TOOL}\nEOF")
    machine.run("chmod +x /usr/local/bin/nvidia-smi")
    found = "$(find /root/.cache/skyward/envs -name pynvml.py)"
    machine.run(f"cat > {found} <<'EOF'\n{_LIBRARY}\nEOF")
    visible = sky.compute(lambda: os.environ["CUDA_VISIBLE_DEVICES"])()
    options = {"accelerator": accelerator, "collect_metrics": False}
    first, second = Steps(), Steps()

    with open_pool(site, machine, steps=first, **options) as pool:
        shares = visible @ pool
    with open_pool(site, machine, steps=second, **options) as pool:
        again = visible @ pool

    # The larger one was made first, as the tool lists them: what counts is the order that was asked for.
    listed = machine.run("cat /root/parts").split()
    assert shares == again == tuple(f"MIG-{listed.index(profile)}" for profile in accelerator.mig)
    assert first.seen == second.seen == ["ssh", "upload", "mig", "gpu", "agent"]
    assert machine.run("grep -c -- -cgi /root/nvidia-smi.log").strip() == "1"
