"""How much RAM this process takes, and how much there is."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dqx.common import accelerator

if TYPE_CHECKING:
    import torch

GB = 10**9


#: What `keep_freed` keeps, and from which size on memory is mapped for itself and goes back at once (glibc's largest).
KEPT = 128 * 2**20
MAPPED = 32 * 2**20


def keep_freed() -> None:
    """Let the C library (glibc) keep some freed memory for what comes next, until `trim`.

    By default every forward's tensors go back to the system, page by page, and come again: a fifth of the time of a
    small model.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for parameter, size in ((-1, KEPT), (-3, MAPPED)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            library.mallopt(parameter, size)


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


def machine_bytes() -> int:
    """RAM for each of the run's processes here: the machine's, or its control group's (container, Slurm job)."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    root = Path("/sys/fs/cgroup")
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                group = root / line.removeprefix("0::/")
                limits += [limit for folder in (group, *group.parents) if (limit := group_limit(folder))]
    return min(limits) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def group_limit(folder: Path) -> int | None:
    """What a control group's folder allows, in bytes; None where it sets no limit."""
    with suppress(OSError):
        text = (folder / "memory.max").read_text().strip()
        return int(text) if text.isdigit() else None
    return None


def gigabytes(number: float) -> str:
    """Bytes with two digits: 8.6 MB, 16 GB."""
    unit, size = ("GB", 1e9) if number >= 1e9 else ("MB", 1e6)
    value = number / size
    return f"{value:.0f} {unit}" if value >= 9.95 else f"{value:.1f} {unit}"
