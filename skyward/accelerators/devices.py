"""The accelerators of a machine: which there are, whether they are what was asked for, and which slot gets which.

`read` asks the drivers; ``python -m skyward.accelerators.devices VENDOR`` prints what it finds, for callers elsewhere.
All else only computes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skyward.accelerators import catalog
from skyward.accelerators.model import Accelerator
from skyward.errors import invalid

# --- facts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """A MIG partition of a GPU: how CUDA calls it, and its profile."""

    uuid: str
    profile: str


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator.

    Attributes
    ----------
    id
        How its runtime calls it: the UUID of an NVIDIA GPU, the number of any other.
    name, memory_bytes
        As the driver says; empty and 0: it was not asked.
    divided
        Whether MIG is on: then only its parts can be used.
    """

    id: str
    name: str = ""
    memory_bytes: int = 0
    divided: bool = False
    parts: tuple[Part, ...] = ()

    def __str__(self) -> str:
        memory = f" ({self.memory_bytes / 1e9:.0f} GB)" if self.memory_bytes else ""
        return f"{self.name or self.id}{memory}"


@dataclass(frozen=True, slots=True)
class Reading:
    """The accelerators of one vendor on a machine, and why there may be more than could be seen."""

    devices: tuple[Device, ...] = ()
    error: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Reading:
        raw = json.loads(text)
        devices = [
            Device(**{**device, "parts": tuple(Part(**part) for part in device["parts"])}) for device in raw["devices"]
        ]
        return Reading(tuple(devices), raw["error"])


# --- reading ------------------------------------------------------------------------------------------------


def read(vendor: str, root: Path = Path("/")) -> Reading:
    """Return what there is of a vendor's accelerators. `root` is the folder that holds ``dev`` and ``sys``."""
    match vendor:
        case "NVIDIA":
            return _read_nvidia()
        case "AMD":
            return _numbered(len(_amd_nodes(root)))
        case "AWS":
            return _numbered(_count(root / "dev", r"neuron\d+"))
        case "Google":
            return _numbered(_count(root / "dev", r"accel\d+") or _count(root / "dev/vfio", r"\d+"))
        case "Habana":
            return _numbered(_count(root / "dev/accel", r"accel\d+") or _count(root / "dev", r"hl\d+"))
        case _:
            raise ValueError(f"no accelerators of {vendor!r} are known")


def _read_nvidia() -> Reading:
    try:
        import pynvml
    except ImportError:
        return Reading(error="the driver can't be asked without nvidia-ml-py: pip install 'skyward[gpu]'")
    return read_nvml(pynvml)


def read_nvml(nvml: Any) -> Reading:
    """Return the GPUs that NVIDIA's management library shows; `nvml` is the module ``pynvml``."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as exc:
        return Reading(error=f"the NVIDIA driver does not answer: {exc}")
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        return Reading(tuple(_gpu(nvml, handle) for handle in handles))
    except nvml.NVMLError as exc:
        return Reading(error=f"the NVIDIA driver has failed: {exc}")
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, handle: Any) -> Device:
    try:
        divided = nvml.nvmlDeviceGetMigMode(handle)[0] == nvml.NVML_DEVICE_MIG_ENABLE
    except nvml.NVMLError:  # a GPU, or a driver, that has no MIG
        divided = False
    return Device(
        id=nvml.nvmlDeviceGetUUID(handle),
        name=nvml.nvmlDeviceGetName(handle),
        memory_bytes=nvml.nvmlDeviceGetMemoryInfo(handle).total,
        divided=divided,
        parts=tuple(_parts(nvml, handle)) if divided else (),
    )


def _parts(nvml: Any, handle: Any) -> list[Part]:
    found = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            part = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
        except nvml.NVMLError_NotFound:  # fewer partitions than there may be
            continue
        # "NVIDIA A100-SXM4-40GB MIG 3g.20gb"
        found.append(Part(nvml.nvmlDeviceGetUUID(part), nvml.nvmlDeviceGetName(part).rpartition("MIG ")[2]))
    return found


def _numbered(count: int) -> Reading:
    return Reading(tuple(Device(str(i)) for i in range(count)))


def _count(folder: Path, name: str) -> int:
    return sum(re.fullmatch(name, path.name) is not None for path in folder.iterdir()) if folder.is_dir() else 0


def _amd_nodes(root: Path) -> list[Path]:
    """Return what the kernel's driver for AMD lists of processors that have SIMD units: its GPUs, not its CPUs."""
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")
    return [path for path in nodes if re.search(r"^simd_count [1-9]", path.read_text(), re.MULTILINE)]


# --- what was asked for -------------------------------------------------------------------------------------

_TOLERANCE = 0.1
"""Share of its memory that a device may lack: some keep a part for themselves, e.g. 14.9 GiB are left of 16."""


def fitting(wanted: Accelerator, devices: Sequence[Device]) -> list[Device]:
    """Return those that are of the model, and have the memory, that is asked for."""
    return [device for device in devices if _fits(wanted, device)]


def _fits(wanted: Accelerator, device: Device) -> bool:
    model = catalog.recognise(device.name)
    if model is not None and model.name != wanted.model:  # what the catalogue does not know may go by many names
        return False
    return not device.memory_bytes or device.memory_bytes >= (1 - _TOLERANCE) * wanted.memory * 1e9


def missing(wanted: Accelerator, reading: Reading) -> str:
    """Return in what a machine falls short of what is asked for, with both numbers; empty when it does not."""
    found = fitting(wanted, reading.devices)
    if len(found) < wanted.count:
        there = f": {', '.join(map(str, reading.devices))}" if reading.devices else ""
        others = len(reading.devices) - len(found)
        also = f", and {others} other or with less memory" if others else ""
        text = f"{wanted.count} × {wanted.name} ({wanted.memory} GB) asked for, {len(found)} there{also}{there}"
        return f"{text}; {reading.error}" if reading.error else text
    for number, device in enumerate(found[: wanted.count]):
        have = sorted(part.profile for part in device.parts)
        if wanted.mig and have != sorted(wanted.mig):
            return (
                f"GPU {number} ({device.id}) is to be partitioned into {' + '.join(wanted.mig)}, and has "
                f"{' + '.join(have) or 'no partitions'}"
            )
        if device.divided and not wanted.mig:
            return (
                f"GPU {number} ({device.id}) is in MIG mode with {' + '.join(have) or 'no partitions'}: ask for them "
                f"with mig=, or end that with `nvidia-smi -i {device.id} -mig 0`"
            )
    return ""


def names(wanted: Accelerator, devices: Sequence[Device]) -> tuple[str, ...]:
    """Return how the runtime calls what is asked for, of devices that have it: GPUs, or their partitions."""
    found = fitting(wanted, devices)[: wanted.count]
    if not wanted.mig:
        return tuple(device.id for device in found)
    named = []
    for device in found:
        left = list(device.parts)
        for profile in wanted.mig:  # in the order in which they were asked for
            part = next(part for part in left if part.profile == profile)
            left.remove(part)
            named.append(part.uuid)
    return tuple(named)


def declared(wanted: Accelerator) -> tuple[str, ...]:
    """Return names for devices that don't exist, for trying out what needs them."""
    numbers = [str(i) for i in range(wanted.count)]
    return tuple(f"MIG-{n}-{i}" for n in numbers for i in range(len(wanted.mig))) if wanted.mig else tuple(numbers)


# --- shared out among slots ---------------------------------------------------------------------------------

_LOGICAL = "NEURON_LOGICAL_NC_CONFIG"
# Chips that one process may have of a TPU host, and how they lie there: one, half of a host or a host of v2 to v6e.
# The variables are libtpu's; Ray sets the same (python/ray/_private/accelerators/tpu.py).
_TPU_SHAPES = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
_RESOURCES = {"NVIDIA": "GPU", "AMD": "GPU", "AWS": "NEURON", "Google": "TPU", "Habana": "HPU"}


def environments(
    wanted: Accelerator, named: Sequence[str], slots: int, environment: Mapping[str, str]
) -> tuple[dict[str, str], ...]:
    """Return, for each slot of a node, the variables that show it its share of the accelerators and no other.

    Shares are even; slots that outnumber GPUs share them.

    Parameters
    ----------
    named
        Names of all devices of the node, as from `names`.
    environment
        Variables of the pool: some change how devices are counted.
    """
    if wanted.slice_topology:  # its hosts work as one, on all their chips
        return ({},) * slots
    if wanted.vendor == "AWS":
        return tuple(_neuron(share) for share in _shares(range(_cores(wanted, environment)), slots))
    return tuple(_visible(wanted.vendor, share) for share in _shares(named, slots))


def _shares(things: Sequence[Any], slots: int) -> list[Sequence[Any]]:
    count = len(things)
    firsts = [slot * count // slots for slot in range(slots)]
    return [things[first : max(first + 1, (i + 1) * count // slots)] for i, first in enumerate(firsts)]


def _neuron(cores: Sequence[int]) -> dict[str, str]:
    first, last = cores[0], cores[-1]
    return {"NEURON_RT_VISIBLE_CORES": str(first) if first == last else f"{first}-{last}"}


def _visible(vendor: str, share: Sequence[str]) -> dict[str, str]:
    text = ",".join(share)
    match vendor:
        case "NVIDIA":
            return {"CUDA_VISIBLE_DEVICES": text}
        case "AMD":
            # Not ROCR_VISIBLE_DEVICES as well, which acts before it: numbers would then count within that choice.
            return {"HIP_VISIBLE_DEVICES": text}
        case "Habana":
            return {"HABANA_VISIBLE_MODULES": text}
        case _:
            return {
                "TPU_VISIBLE_CHIPS": text,
                "TPU_CHIPS_PER_PROCESS_BOUNDS": _TPU_SHAPES[len(share)],
                "TPU_PROCESS_BOUNDS": "1,1,1",
            }


def _cores(wanted: Accelerator, environment: Mapping[str, str]) -> int:
    """Return how many NeuronCores the runtime counts on a node."""
    physical, grouped = wanted.facts.cores
    text = environment.get(_LOGICAL, str(grouped))
    if text not in {"1", str(grouped)}:
        accepted = f"1 or {grouped} for {wanted.model}" if grouped > 1 else f"1 for {wanted.model}, or nothing"
        raise invalid("env", text, accepted, shown=f"{_LOGICAL}={text!r}")
    return wanted.count * physical // int(text)


def resources(wanted: Accelerator, slots: int) -> dict[str, float]:
    """Return the Dask resource of each slot: its share of the node's GPUs, or partitions, or other accelerators."""
    return {_RESOURCES[wanted.vendor]: (wanted.partitions or wanted.count) / slots}


def check_shares(wanted: Accelerator, slots: int, environment: Mapping[str, str]) -> None:
    """Refuse more slots on a node than its accelerators can be shared out to. GPUs can be shared by any number.

    Raises
    ------
    ValueError
        What `slots` would be accepted.
    """
    if wanted.slice_topology or wanted.vendor in ("NVIDIA", "AMD"):
        return
    most, what = wanted.count, f"{wanted.count} × {wanted.model}"
    if wanted.vendor == "AWS":
        most, what = _cores(wanted, environment), f"{_cores(wanted, environment)} NeuronCores of {what}"
    if slots > most:
        raise ValueError(f"up to {most} with {what}, none of which two processes can share")
    if wanted.vendor == "Google" and (wanted.count % slots or wanted.count // slots not in _TPU_SHAPES):
        accepted = [str(n) for n in range(1, most + 1) if most % n == 0 and most // n in _TPU_SHAPES]
        raise ValueError(f"{' or '.join(accepted) or 'no number at all'} with {what}: a process has 1, 2, 4 or 8 chips")


if __name__ == "__main__":
    print(read(sys.argv[1]).to_json())
