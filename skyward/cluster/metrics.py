"""How busy this machine is, as an agent tells it. Imports nothing of skyward."""

from __future__ import annotations

import contextlib
from typing import Any

import psutil

PERIOD_S = 5.0
_MB = 1e6


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
    try:
        import pynvml
    except ImportError:
        return {}
    with contextlib.suppress(pynvml.NVMLError):  # no driver, or one without a GPU
        pynvml.nvmlInit()
        try:
            return _read(pynvml)
        finally:
            pynvml.nvmlShutdown()
    return {}


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
