"""The device that a model runs on: asked for by name, never replaced by another."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

_DRIVER = Path("/proc/driver/nvidia/version")
_CPU_FACTS = Path("/proc/cpuinfo")


class DeviceError(ValueError):
    """A device that is not there; one line that names it and the fix."""


def find_device(name: str | torch.device) -> torch.device:
    """The device called `name`, e.g. cpu, cuda or cuda:1. Raises DeviceError where it cannot be used."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:
        # torch raises RuntimeError, AssertionError and NotImplementedError.
        cause = str(error).split("\n", 1)[0]
        raise DeviceError(
            f"device {name}: {cause}; install its driver and a torch build for it, or ask for cpu"
        ) from error
    return device


def driver_of(device: torch.device) -> str:
    """What makes results of equal code differ between machines: processor, driver, torch and its threads."""
    if device.type == "cuda":
        found = re.search(r"Kernel Module\D*([\d.]+)", _read(_DRIVER))
        driver = f"driver {found[1] if found else 'unknown'}, CUDA {torch.version.cuda}"
        return f"{torch.cuda.get_device_name(device)}, {driver}, torch {torch.__version__}"
    found = re.search(r"model name\s*: (.+)", _read(_CPU_FACTS))
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
