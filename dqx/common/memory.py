"""How much memory this process takes, and a bound on it."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes a second: where nothing is computed it is not imported
    import torch

GB = 10**9


def trim() -> None:
    """Give memory that is free back to the system, where the C library can (glibc): its heap grows with every block."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def watch_peaks(device: torch.device) -> None:
    """Let `peak_ram` and `peak_gpu` look at what comes from now on; `peak_ram` only where the system is Linux."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def bound_gpu(device: torch.device, gb: float | None) -> None:
    """Let tensors on a CUDA device take so many 10^9 bytes at most (None: all it has); more raises OutOfMemoryError."""
    if device.type == "cuda":
        import torch

        there = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if gb is None else min(1.0, gb * GB / there), device)


def peak_ram() -> int:
    """The largest resident size of this process, in bytes: since `watch_peaks`, or so far."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu(device: torch.device) -> int:
    """The most memory that tensors on a CUDA device have taken, in bytes, as `peak_ram`; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    import torch

    return torch.cuda.max_memory_allocated(device)
