"""How many windows fit into memory at a time."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from clapsep.engine.jobs import WindowModel

logger = logging.getLogger(__name__)

# More windows than these in a call gain nothing: every core, every multiprocessor has its share by then.
MOST_WINDOWS_CPU = 8
MOST_WINDOWS_GPU = 64
# The rest is for audio on its way, for other processes, and for allocators that cannot fill every gap.
USABLE_SHARE = 0.5
_CALIBRATION_WINDOWS = 2
_OUT_OF_MEMORY = re.compile(
    "DefaultCPUAllocator: (can't allocate|not enough) memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED"
)


class Fit(NamedTuple):
    """The batch size found, and from what: `window_bytes` for each window of `free_bytes`."""

    windows: int
    window_bytes: int
    free_bytes: int


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch or numpy could not get the memory it asked for, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def fitting_batch(
    model: WindowModel,
    condition_dim: int,
    device: torch.device,
    budget_bytes: int | None = None,
) -> Fit:
    """Find the batch size that memory allows, by running two windows of noise through the model.

    Conditions are (B, `condition_dim`). `budget_bytes` is the memory for a batch, by default half of what is
    free on the device now (CPU: of the machine or of the container, whichever has less). The size is the
    largest power of two that fits, at most 8 windows on the CPU and 64 on a GPU.
    """
    free = int(_free_bytes(device) * USABLE_SHARE) if budget_bytes is None else budget_bytes
    window_bytes = _peak_bytes(model, condition_dim, device) // _CALIBRATION_WINDOWS
    most = MOST_WINDOWS_CPU if device.type == "cpu" else MOST_WINDOWS_GPU
    windows = min(most, max(1, free // max(1, window_bytes)))
    fit = Fit(1 << (windows.bit_length() - 1), window_bytes, free)
    logger.info(
        "batch size %d: a window takes %.0f MB of the %.1f GB that %s may use",
        fit.windows,
        window_bytes / 1e6,
        free / 1e9,
        device,
    )
    return fit


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *_container_bytes()])


def _container_bytes() -> list[int]:
    """What the control group may still take; a container's memory is not the machine's."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return []
    return [] if limit == "max" else [max(0, int(limit) - int(used))]


def _peak_bytes(model: WindowModel, condition_dim: int, device: torch.device) -> int:
    """What a call with `_CALIBRATION_WINDOWS` windows takes at its height."""
    generator = torch.Generator().manual_seed(0)
    mixture = torch.rand((_CALIBRATION_WINDOWS, model.window), generator=generator).to(device)
    condition = torch.rand((_CALIBRATION_WINDOWS, condition_dim), generator=generator).to(device)

    def run(count: int) -> None:
        with torch.inference_mode():
            encoded = model.encode(mixture[:count])
            model.decode(encoded, torch.arange(count, device=device), condition[:count]).cpu()

    if device.type == "cuda":
        run(1)  # libraries take their own memory in the first call
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(_CALIBRATION_WINDOWS)
        return torch.cuda.max_memory_allocated(device) - before
    # Only the very first call is sure to take its memory from the system.
    before = psutil.Process().memory_info().rss
    if not _forget_peak():
        return 0
    run(_CALIBRATION_WINDOWS)
    return max(0, _resident_peak() - before)


def _forget_peak() -> bool:
    """Have the kernel count this process's peak from now; whether it does (Linux)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _resident_peak() -> int:
    status = Path(f"/proc/{os.getpid()}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024
