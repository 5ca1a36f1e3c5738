"""What the machine is, and the energy that it takes."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

POWERCAP = Path("/sys/class/powercap")
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "pillow")

Reading = Mapping[str, float]


class Joules:
    """Counters of energy: a GPU's through NVML, else those of the processors' packages (RAPL).

    Many systems let only root read the latter. Where there is no counter, there is no figure.
    """

    def __init__(self, *, cuda: bool) -> None:
        self._gpu = _gpu_counter() if cuda else None
        self._packages = {} if cuda else _packages(POWERCAP)

    def read(self) -> Reading:
        """All counters, in joules."""
        found: dict[str, float] = {}
        if self._gpu is not None:
            found["gpu"] = self._gpu()
        for name, place in self._packages.items():
            with contextlib.suppress(OSError, ValueError):
                found[name] = int((place / "energy_uj").read_text()) / 1e6
        return found

    def since(self, before: Reading) -> float | None:
        """Joules since a reading; None without counters."""
        now = self.read()
        if not now or now.keys() != before.keys():
            return None
        return sum(self._difference(name, before[name], now[name]) for name in now)

    def _difference(self, name: str, before: float, now: float) -> float:
        if now >= before or name not in self._packages:
            return now - before
        most = int((self._packages[name] / "max_energy_range_uj").read_text()) / 1e6
        return now - before + most  # it began again at nought


def _packages(root: Path) -> dict[str, Path]:
    """The processors' packages whose counters can be read; their parts count into them."""
    found = {}
    for place in sorted(root.glob("*-rapl:*")):
        if place.name.count(":") == 1 and os.access(place / "energy_uj", os.R_OK):
            found[place.name] = place
    return found


def _gpu_counter() -> Any:
    """A function that reads the first visible GPU's energy in joules; None where NVML has none."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    handle, spent = ctypes.c_void_p(), ctypes.c_ulonglong()
    if nvml.nvmlInit_v2():
        return None
    if first.isdigit():
        missing = nvml.nvmlDeviceGetHandleByIndex_v2(int(first), ctypes.byref(handle))
    else:
        missing = nvml.nvmlDeviceGetHandleByUUID(first.encode(), ctypes.byref(handle))
    if missing or nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(spent)):
        return None

    def read() -> float:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(spent))
        return spent.value / 1000

    return read


def machine(device: str) -> dict[str, Any]:
    """What speeds follow, as plain data."""
    from distill.data.workers import cores
    from distill.engine.machine import processor

    found: dict[str, Any] = {
        "device": processor(),
        "processor": processor(),
        "cores": cores(),
        "memory": psutil.virtual_memory().total,
        "system": platform.platform(),
        "python": sys.version.split()[0],
    }  # fmt: skip
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if device == "cuda":
        import torch

        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
        found["gpus"] = torch.cuda.device_count()
    return found
