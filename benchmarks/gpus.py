"""What NVIDIA's driver tells of the GPUs, through its library NVML where it is installed."""

import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

_ASKED = "name,driver_version,clocks.max.sm,clocks.max.memory,power.limit"


def describe() -> str | None:
    """Return the first GPU's name, driver, clocks and power limit, or None where there is none."""
    query = ["nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = found.stdout.strip().splitlines()
    return describe_line(lines[0]) if lines else None


def describe_line(line: str) -> str:
    """Return one line of nvidia-smi's answer in words."""
    name, driver, clock, memory, power = (part.strip() for part in line.split(","))
    return f"{name}, driver {driver}, up to {clock}, memory {memory}, {power}"


def energy_meters() -> list[Callable[[], int]]:
    """Return what reads the millijoules of each GPU since its driver was loaded; none where unknown."""
    nvml = _nvml()
    if nvml is None:
        return []
    meters: list[Callable[[], int]] = []
    try:
        for handle in _handles(nvml):
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # older ones do not know
            meters.append(partial(nvml.nvmlDeviceGetTotalEnergyConsumption, handle))
    except nvml.NVMLError:
        return []
    return meters


def held_memory(process: int) -> int | None:
    """Return the bytes that a process holds on all GPUs, or None where NVML does not tell."""
    nvml = _nvml()
    if nvml is None:
        return None
    try:
        running = [nvml.nvmlDeviceGetComputeRunningProcesses(handle) for handle in _handles(nvml)]
    except nvml.NVMLError:
        return None
    held = [each.usedGpuMemory for some in running for each in some if each.pid == process]
    return sum(held) if held and None not in held else None


def _nvml() -> Any:
    """Return NVML's module, or None where it or a driver is missing."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _handles(nvml: Any) -> list[Any]:
    return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
