"""How much RAM this process takes."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dqx.common import accelerator

if TYPE_CHECKING:
    import torch

GB = 10**9


def trim() -> None:
    """Give memory that is free back to the system, where the C library can (glibc): its heap grows with every block."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def watch_peaks(device: torch.device) -> None:
    """Let `peak_ram` and `accelerator.peak_memory` look at what comes from now on; RAM only where there is Linux."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    accelerator.watch_peak(device)


def peak_ram() -> int:
    """The largest resident size of this process, in bytes: since `watch_peaks`, or so far."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
