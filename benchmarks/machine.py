"""The machine and the versions that figures were taken on: a figure without them says nothing."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "numpy", "mergekit", "mergekit-select", "transformers", "safetensors")


def describe() -> dict[str, str | int | float]:
    """Return the processor, its cores, the memory, the versions in use, and how busy the machine is just now."""
    return {
        "cpu": _cpu_model(),
        "cores": available_cores(),
        "memory_gib": round(_memory_kib("MemTotal") / 2**20, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def available_cores() -> int:
    """Return the hardware threads that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int:
    """Return the memory that can be had without swapping."""
    return _memory_kib("MemAvailable") * 1024


def _cpu_model() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_kib(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/meminfo has no {field}")
