"""NVIDIA's management library as ``pynvml`` offers it, over facts from a file instead of a driver."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

DATA = Path(__file__).parent / "data" / "nvml"


class FakeNvml:
    """One machine's library. Handles are the entries of its file; a call it does not know is an AttributeError."""

    NVML_DEVICE_MIG_ENABLE = 1
    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    class NVMLError_NotFound(NVMLError):  # noqa: N801, N818 - the library's name
        pass

    def __init__(self, machine: str) -> None:
        self._gpus = json.loads((DATA / f"{machine}.json").read_text())["gpus"]
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        assert self.open
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:  # noqa: N802
        return self._gpus[index]

    def nvmlDeviceGetUUID(self, handle: Any) -> str:  # noqa: N802
        return handle["uuid"]

    def nvmlDeviceGetName(self, handle: Any) -> str:  # noqa: N802
        return handle["name"]

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802
        return SimpleNamespace(total=handle["memory_total"], used=handle["memory_total"] // 4)

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:  # noqa: N802
        if handle["mig_mode"] == [1, 1]:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(gpu=50, memory=10)

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:  # noqa: N802
        assert sensor == self.NVML_TEMPERATURE_GPU
        return 40

    def nvmlDeviceGetMigMode(self, handle: Any) -> list[int]:  # noqa: N802
        if handle["mig_mode"] is None:
            raise self.NVMLError("Not Supported")
        return handle["mig_mode"]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int:  # noqa: N802
        return handle["max_mig_devices"]

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int) -> Any:  # noqa: N802
        try:
            return handle["mig_devices"][str(index)]
        except KeyError:
            raise self.NVMLError_NotFound("Not Found") from None
