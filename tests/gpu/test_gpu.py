"""What NVIDIA's driver says, beside its own tool; pools on the GPUs that are here."""

from __future__ import annotations

import os
import subprocess

import pytest

import skyward as sky
from skyward.accelerators.catalog import recognise
from skyward.accelerators.devices import Device
from skyward.node import metrics


@pytest.fixture
def accelerator(gpus: tuple[Device, ...]) -> sky.Accelerator:
    """All GPUs of this machine, as a pool would ask for them."""
    model = recognise(gpus[0].name)
    if model is None:
        pytest.skip(f"the catalogue does not have {gpus[0].name}")
    if any(gpu.divided for gpu in gpus):
        pytest.skip("GPUs here are in MIG mode")
    sizes = [gb for gb in model.memory_gb if gb * 0.9e9 <= gpus[0].memory_bytes]
    return sky.Accelerator(model.name, len(gpus), max(sizes))


def test_the_library_shows_what_nvidia_smi_shows(gpus: tuple[Device, ...]) -> None:
    query = ["nvidia-smi", "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits"]
    rows = [line.split(", ") for line in subprocess.check_output(query, text=True).splitlines()]

    assert [(gpu.id, gpu.name) for gpu in gpus] == [(uuid, name) for uuid, name, _ in rows]
    for gpu, (_, _, mib) in zip(gpus, rows, strict=True):
        assert gpu.memory_bytes == pytest.approx(int(mib) * 2**20, rel=0.02)


def test_partitions_are_those_that_nvidia_smi_lists(gpus: tuple[Device, ...]) -> None:
    listed = subprocess.check_output(["nvidia-smi", "-L"], text=True)

    assert listed.count("UUID: MIG-") == sum(len(gpu.parts) for gpu in gpus)
    assert all(f"{part.uuid})" in listed for gpu in gpus for part in gpu.parts)


def test_one_slot_sees_all_gpus_by_their_uuids(gpus: tuple[Device, ...], accelerator: sky.Accelerator) -> None:
    visible = sky.compute(lambda: os.environ["CUDA_VISIBLE_DEVICES"])()

    with sky.ComputePool("local", accelerator=accelerator, display="quiet") as pool:
        assert visible >> pool == ",".join(gpu.id for gpu in gpus)
        info = sky.compute(sky.instance_info)() >> pool

    assert info is not None
    assert (info.accelerators, info.accelerator) == (len(gpus), accelerator.name)


def test_slots_that_outnumber_gpus_share_them(gpus: tuple[Device, ...], accelerator: sky.Accelerator) -> None:
    visible = sky.compute(lambda: os.environ["CUDA_VISIBLE_DEVICES"])()

    with sky.ComputePool("local", accelerator=accelerator, concurrency=2 * len(gpus), display="quiet") as pool:
        shares = visible @ pool.slots

    assert shares == tuple(gpu.id for gpu in gpus for _ in range(2))


def test_more_gpus_than_are_here_are_missed_with_both_numbers(
    gpus: tuple[Device, ...], accelerator: sky.Accelerator
) -> None:
    more = sky.Accelerator(accelerator.model, len(gpus) + 1, accelerator.memory)

    with pytest.raises(sky.NoMatchingInstanceError, match=f"{len(gpus) + 1} × .* asked for, {len(gpus)} there"):
        sky.ComputePool("local", accelerator=more, display="quiet").__enter__()


def test_how_busy_gpus_are_is_measured(gpus: tuple[Device, ...]) -> None:
    figures = metrics.sample()

    assert 0 <= figures["gpu_utilization"] <= 100
    assert 0 <= figures["gpu_memory_used_mb"] <= figures["gpu_memory_total_mb"]
    assert figures["gpu_memory_total_mb"] == pytest.approx(sum(gpu.memory_bytes for gpu in gpus) / 1e6, rel=0.02)
    assert 0 < figures["gpu_temperature"] < 120


def test_nccl_with_one_rank(gpus: tuple[Device, ...], accelerator: sky.Accelerator) -> None:
    pytest.importorskip("torch", reason="torch is not installed")

    @sky.integrations.torch(backend="nccl")
    @sky.compute
    def total() -> tuple[float, str]:
        import torch
        import torch.distributed as dist

        value = torch.ones(1, device="cuda")
        dist.all_reduce(value)
        return value.item(), dist.get_backend()

    with sky.ComputePool("local", accelerator=accelerator, display="quiet") as pool:
        assert total() @ pool == ((1.0, "nccl"),)
