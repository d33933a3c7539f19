"""How busy this machine is, as an agent tells it. Imports nothing of skyward."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil

PERIOD_S = 5.0
_MB = 1e6


class Sampler:
    """Takes samples in a thread, because a driver that is asked for the first time may take seconds.

    It is one thread: psutil counts for each by itself, and the first sample of another would say 0 % of processors.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "skyward-metrics")

    async def sample(self) -> dict[str, float]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, sample)

    def close(self) -> None:
        self._thread.shutdown(wait=False)


def sample() -> dict[str, float]:
    """Return the fields of `skyward.events.Metrics` for now; those of GPUs only where the driver answers.

    Processor use is since the call before, so the first says nothing. Memory is in MB (10⁶ bytes), of all GPUs
    together; utilization in percent is their mean, temperature in degrees Celsius the highest.
    """
    memory = psutil.virtual_memory()
    return {
        "cpu_percent": psutil.cpu_percent(),
        "memory_percent": memory.percent,
        "memory_used_mb": (memory.total - memory.available) / _MB,
        "memory_total_mb": memory.total / _MB,
        **_gpus(),
    }


def _gpus() -> dict[str, float]:
    nvml = _nvml()
    if nvml is not None:
        with contextlib.suppress(nvml.NVMLError):  # a GPU that does not tell, or is being reset
            return _read(nvml)
    return {}


@functools.cache
def _nvml() -> Any:
    """Return NVML, opened for good: to open it may take the driver a second. None: there is none, or no GPU."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _read(nvml: Any) -> dict[str, float]:
    devices = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    if not devices:
        return {}
    memory = [nvml.nvmlDeviceGetMemoryInfo(d) for d in devices]
    utilization = {}
    with contextlib.suppress(nvml.NVMLError):  # not known of GPUs in MIG mode: NVML API Reference Guide
        mean = sum(nvml.nvmlDeviceGetUtilizationRates(d).gpu for d in devices) / len(devices)
        utilization = {"gpu_utilization": mean}
    return {
        **utilization,
        "gpu_memory_used_mb": sum(m.used for m in memory) / _MB,
        "gpu_memory_total_mb": sum(m.total for m in memory) / _MB,
        "gpu_temperature": max(nvml.nvmlDeviceGetTemperature(d, nvml.NVML_TEMPERATURE_GPU) for d in devices),
    }
