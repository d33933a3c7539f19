"""Accelerators of machines: what drivers say, whether that is what was asked for, and each slot's share."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import skyward as sky
from skyward.accelerators.devices import Device, Reading, declared, environments, missing, names, read, read_nvml
from skyward.cluster.slots import node_spec
from skyward.node import metrics
from tests.nvml import FakeNvml

GPU = sky.Accelerator.NVIDIA


def seen(machine: str) -> Reading:
    return read_nvml(FakeNvml(machine))


def visible(accelerator: sky.Accelerator, reading: Reading, slots: int) -> list[str]:
    shares = environments(accelerator, names(accelerator, reading.devices), slots, {})
    return [share["CUDA_VISIBLE_DEVICES"] for share in shares]


# --- what drivers say ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "accelerator"),
    [
        ("t4", GPU.T4()),
        ("a100-40gb", GPU.A100(memory=40)),
        ("a100-80gb", GPU.A100()),
        ("h100x8", GPU.H100(8)),
        ("h100x8", GPU.H100(3)),
        ("a100-mig", GPU.A100(2, mig="3g.40gb")),
        ("a100-mig", GPU.A100(mig="3g.40gb")),
        ("h100-mig", GPU.H100(mig=["1g.10gb", "2g.20gb", "3g.40gb", "1g.10gb"])),
    ],
)
def test_a_machine_that_has_what_was_asked_for_lacks_nothing(machine: str, accelerator: sky.Accelerator) -> None:
    assert missing(accelerator, seen(machine)) == ""


def test_the_driver_is_let_go_of_after_reading() -> None:
    nvml = FakeNvml("t4")

    assert [d.name for d in read_nvml(nvml).devices] == ["Tesla T4"]
    assert nvml.open == 0


def test_partitions_are_found_though_their_numbers_have_gaps() -> None:
    (gpu,) = seen("h100-mig").devices

    assert gpu.divided
    assert [part.profile for part in gpu.parts] == ["3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb"]


def test_a_driver_that_does_not_answer_is_told_beside_the_numbers() -> None:
    nvml = FakeNvml("t4")

    def fail() -> None:
        raise FakeNvml.NVMLError("Driver Not Loaded")

    nvml.nvmlInit = fail  # type: ignore[method-assign]

    text = missing(GPU.T4(2), read_nvml(nvml))

    assert text == "2 × T4 (16 GB) asked for, 0 there; the NVIDIA driver does not answer: Driver Not Loaded"


def test_what_was_read_travels_as_text() -> None:
    reading = seen("h100-mig")

    assert Reading.from_json(reading.to_json()) == reading


def test_the_module_run_on_a_machine_prints_what_it_finds() -> None:
    command = [sys.executable, "-m", "skyward.accelerators.devices", "AWS"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stderr) == (0, "")
    assert Reading.from_json(done.stdout) == read("AWS")


@pytest.mark.parametrize(
    ("vendor", "files", "count"),
    [
        ("AWS", ["dev/neuron0", "dev/neuron1", "dev/neuron10", "dev/neuron_log"], 3),
        ("Google", ["dev/accel0", "dev/accel1", "dev/accelerometer"], 2),
        ("Google", ["dev/vfio/0", "dev/vfio/1", "dev/vfio/vfio"], 2),
        ("Habana", ["dev/accel/accel0", "dev/accel/accel_controlD0"], 1),
        ("AMD", [], 0),
    ],
)
def test_devices_of_other_vendors_are_counted(tmp_path: Path, vendor: str, files: list[str], count: int) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    assert [d.id for d in read(vendor, tmp_path).devices] == [str(i) for i in range(count)]


def test_amds_gpus_are_told_from_processors(tmp_path: Path) -> None:
    for number, units in enumerate([0, 304, 304]):
        node = tmp_path / f"sys/class/kfd/kfd/topology/nodes/{number}"
        node.mkdir(parents=True)
        (node / "properties").write_text(f"cpu_cores_count 0\nsimd_count {units}\n")

    assert len(read("AMD", tmp_path).devices) == 2


@pytest.mark.parametrize(("machine", "utilization"), [("h100x8", 50.0), ("a100-mig", None)])
def test_how_busy_gpus_are_is_told_as_far_as_the_driver_says(
    monkeypatch: pytest.MonkeyPatch, machine: str, utilization: float | None
) -> None:
    nvml = FakeNvml(machine)
    nvml.nvmlInit()
    monkeypatch.setattr(metrics, "_nvml", lambda: nvml)
    total = sum(device.memory_bytes for device in seen(machine).devices) / 1e6

    figures = metrics.sample()

    assert figures.get("gpu_utilization") == utilization
    assert (figures["gpu_memory_used_mb"], figures["gpu_memory_total_mb"]) == (total / 4, total)
    assert figures["gpu_temperature"] == 40


# --- what was asked for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "accelerator", "message"),
    [
        ("t4", GPU.T4(4), r"^4 × T4 \(16 GB\) asked for, 1 there: Tesla T4 \(16 GB\)$"),
        ("t4", GPU.A100(), r"1 × A100 .* 0 there, and 1 other or with less memory: Tesla T4"),
        ("a100-40gb", GPU.A100(), r"1 × A100 \(80 GB\) asked for, 0 there"),
        ("h100x8", GPU.H200(8), "8 × H200 .* 0 there, and 8 other"),
        ("a100-80gb", GPU.A100(mig="3g.40gb"), r"to be partitioned into 3g.40gb \+ 3g.40gb, and has no partitions"),
        ("a100-mig", GPU.A100(2, mig="1g.20gb"), r"and has 3g.40gb \+ 3g.40gb"),
        ("a100-mig", GPU.A100(2), r"is in MIG mode .*`nvidia-smi -i GPU-\S+ -mig 0"),
    ],
)
def test_what_a_machine_lacks_is_told_with_both_numbers(
    machine: str, accelerator: sky.Accelerator, message: str
) -> None:
    assert re.search(message, missing(accelerator, seen(machine)))


def test_a_gpu_of_another_kind_beside_those_asked_for_is_passed_over() -> None:
    screen = Device("GPU-screen", "NVIDIA T400", 4 << 30)
    reading = Reading((screen, *seen("a100-80gb").devices))

    assert missing(GPU.A100(), reading) == ""
    assert names(GPU.A100(), reading.devices) == (reading.devices[1].id,)


# --- shares -------------------------------------------------------------------------------------------------


def test_one_slot_sees_all_gpus_and_several_divide_them_evenly() -> None:
    reading = seen("h100x8")
    uuids = [d.id for d in reading.devices]

    assert visible(GPU.H100(8), reading, 1) == [",".join(uuids)]
    assert visible(GPU.H100(8), reading, 4) == [",".join(uuids[i : i + 2]) for i in (0, 2, 4, 6)]
    assert visible(GPU.H100(8), reading, 8) == uuids
    assert all(uuid.startswith("GPU-") for uuid in uuids)


def test_slots_that_outnumber_gpus_share_them() -> None:
    reading = seen("h100x8")

    shares = visible(GPU.H100(2), reading, 4)

    assert shares == [reading.devices[0].id] * 2 + [reading.devices[1].id] * 2


def test_each_partition_has_slots_of_its_own_in_the_order_asked_for() -> None:
    accelerator = GPU.H100(mig=["1g.10gb", "2g.20gb", "3g.40gb", "1g.10gb"])
    reading = seen("h100-mig")
    parts = reading.devices[0].parts

    shares = visible(accelerator, reading, 8)

    assert shares[::2] == shares[1::2] == [parts[i].uuid for i in (2, 1, 0, 3)]
    assert all(share.startswith("MIG-") for share in shares)


@given(st.integers(1, 16), st.integers(1, 40))
def test_every_gpu_is_used_and_shares_are_even(gpus: int, slots: int) -> None:
    accelerator = GPU.T4(gpus)

    shares = [e["CUDA_VISIBLE_DEVICES"].split(",") for e in environments(accelerator, declared(accelerator), slots, {})]

    sizes = {len(share) for share in shares}
    assert {gpu for share in shares for gpu in share} == {str(i) for i in range(gpus)}
    assert max(sizes) - min(sizes) <= 1
    assert slots > gpus or sum(map(len, shares)) == gpus


@pytest.mark.parametrize(
    ("accelerator", "slots", "environment", "expected"),
    [
        (sky.Accelerator.AWS.Trainium(1, 16), 1, {}, ["0-31"]),
        (sky.Accelerator.AWS.Trainium(1), 2, {}, ["0", "1"]),
        (sky.Accelerator.AWS.Trainium(2), 2, {}, ["0-1", "2-3"]),
        (sky.Accelerator.AWS.Trainium(2), 2, {"NEURON_LOGICAL_NC_CONFIG": "1"}, ["0-3", "4-7"]),
        (sky.Accelerator.AWS.Inferentia(1), 4, {}, ["0", "1", "2", "3"]),
    ],
)
def test_neuron_cores_are_divided(
    accelerator: sky.Accelerator, slots: int, environment: dict[str, str], expected: list[str]
) -> None:
    shares = environments(accelerator, declared(accelerator), slots, environment)

    assert [share["NEURON_RT_VISIBLE_CORES"] for share in shares] == expected


def test_other_vendors_have_variables_of_their_own() -> None:
    amd, gaudi = sky.Accelerator.AMD.MI("300X", 2), sky.Accelerator.Habana.Gaudi(2, 2)
    tpu = sky.Accelerator.Google.TPU("v5e", 4)

    assert environments(amd, declared(amd), 2, {}) == ({"HIP_VISIBLE_DEVICES": "0"}, {"HIP_VISIBLE_DEVICES": "1"})
    assert environments(gaudi, declared(gaudi), 1, {}) == ({"HABANA_VISIBLE_MODULES": "0,1"},)
    assert environments(tpu, declared(tpu), 2, {})[1] == {
        "TPU_VISIBLE_CHIPS": "2,3",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,2,1",
        "TPU_PROCESS_BOUNDS": "1,1,1",
    }
    assert environments(sky.Accelerator.Google.TPUSlice("v5p-8"), ["0"], 1, {}) == ({},)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator": "Trainium1", "concurrency": 3}, "up to 2 with 2 NeuronCores of 1 × Trainium1"),
        ({"accelerator": "Gaudi2:8", "concurrency": 9}, "up to 8 with 8 × Gaudi2"),
        ({"accelerator": "TPU-v5e:4", "concurrency": 3}, "1 or 2 or 4 with 4 × TPU-v5e"),
        (
            {"accelerator": "Trainium2", "env": {"NEURON_LOGICAL_NC_CONFIG": "3"}},
            "NEURON_LOGICAL_NC_CONFIG='3' is invalid: expected 1 or 2",
        ),
    ],
)
def test_slots_that_cannot_share_are_refused_before_anything_starts(options: dict[str, Any], message: str) -> None:
    with pytest.raises(sky.SpecError, match=message):
        sky.ComputePool("local", **options)


def test_resources_are_shares_of_gpus_or_of_partitions() -> None:
    assert node_spec(0, 4, GPU.A100(2)).resources[1:] == ({"GPU": 0.5},) * 3
    assert node_spec(0, 2, GPU.A100(mig="3g.40gb")).resources == ({"NODE": 1.0, "GPU": 1.0}, {"GPU": 1.0})
    assert node_spec(0, 1, sky.Accelerator.AWS.Trainium(2, 16)).resources == ({"NODE": 1.0, "NEURON": 16.0},)
    assert node_spec(0, 2).resources == ({"NODE": 1.0}, {})
