"""The accelerator of this machine, whatever its make: CUDA, ROCm (which torch calls cuda), XPU.

All of dqx asks torch through this file. What `torch.accelerator` leaves to each make is here with what stands for it
where a make has none. Functions of a device take the CPU as well and do nothing on it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

log = logging.getLogger(__name__)

#: Accelerators that torch knows and dqx does not run on, and why.
UNFIT = {"mps": "Apple's GPU has no float64, in which rotations, statistics and likelihoods are computed"}


def kind() -> str | None:
    """The type of this machine's accelerator (cuda, xpu); None where there is none that dqx runs on."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None or device.type in UNFIT else device.type


def count() -> int:
    """How many devices there are of that type."""
    return 0 if kind() is None else torch.accelerator.device_count()


def name(device: torch.device) -> str:
    """What the device calls itself; of the CPU, and of makes that do not say, the type."""
    ask = getattr(torch.get_device_module(device), "get_device_name", None)
    return device.type if device.type == "cpu" or ask is None else str(ask(device))


def names() -> list[str]:
    """What the devices of that type call themselves."""
    here = kind()
    return [] if here is None else [name(torch.device(here, i)) for i in range(count())]


def capability(device: torch.device) -> str | None:
    """The generation of a CUDA device (sm_90), the vector instructions of the CPU; None elsewhere."""
    if device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability()
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else None


def instructions(device: torch.device) -> list[str]:
    """Of the CPU's instructions those that decide how fast products of few bits are, as torch names them."""
    deciding = ("avx2", "avx512_f", "avx512_bf16", "avx_vnni", "avx512_vnni", "amx_bf16", "amx_int8")
    return [name for name in deciding if _cpu().get(name)] if device.type == "cpu" else []


def _cpu() -> Mapping[str, Any]:
    """What torch says of the CPU."""
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 may not have it
    return found


def bf16(device: torch.device) -> str | None:
    """Whether the device computes in bfloat16 itself, `native`, or by way of float32, `emulated`; None: not known."""
    if device.type == "cpu":
        there = _cpu()
        known = [there[name] for name in ("avx512_bf16", "amx_bf16", "bf16") if name in there]
        return ("native" if any(known) else "emulated") if known else None
    if device.type == "cuda" and torch.version.hip is None:
        return "native" if torch.cuda.get_device_capability(device) >= (8, 0) else "emulated"
    ask = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return None if ask is None else "native" if ask(including_emulation=False) else "emulated"


def cuda_version(device: torch.device) -> str | None:
    """The version of CUDA that torch was built for; None for other devices, and for ROCm."""
    return torch.version.cuda if device.type == "cuda" else None


def settings(device: torch.device) -> dict[str, Any]:
    """What of torch's settings, and of CUDA's libraries', decides whether results repeat to the last bit."""
    there = {
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }
    if device.type != "cuda":
        return there
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    return there | {"cudnn_benchmark": torch.backends.cudnn.benchmark, "cublas_workspace": workspace}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Give memory that is free back to the device."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def total_memory(device: torch.device) -> int:
    """Bytes that an accelerator has."""
    return int(torch.accelerator.get_memory_info(device)[1])


def free_memory(device: torch.device) -> float:
    """Bytes that this process may still take on an accelerator (`bound_memory`); on the CPU infinite."""
    if device.type == "cpu":
        return float("inf")
    free, there = torch.accelerator.get_memory_info(device)
    reserved = torch.accelerator.memory_reserved(device)
    share = getattr(torch.get_device_module(device), "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return float(min(free, share * there - reserved) + reserved - torch.accelerator.memory_allocated(device))


def bound_memory(device: torch.device, size: float | None) -> None:
    """Let tensors on an accelerator take so many bytes at most (None: all it has); more raises OutOfMemoryError.

    Where a make has no such bound, what a run takes is still compared with it in its record.
    """
    bound = getattr(torch.get_device_module(device), "set_per_process_memory_fraction", None)
    if device.type != "cpu" and bound is not None:
        bound(1.0 if size is None else min(1.0, size / total_memory(device)), device)


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Let an OutOfMemoryError that comes out say what to change, unless it does already: a note, shown behind it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if not hasattr(error, "__notes__"):
            error.add_note(advice)
        raise


def watch_peak(device: torch.device) -> None:
    """Let `peak_memory` look at what comes from now on."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors on an accelerator have taken since `watch_peak`, or so far; 0 on the CPU."""
    return 0 if device.type == "cpu" else int(torch.accelerator.max_memory_allocated(device))


Work = Callable[[], None]


def captured(work: Work, device: torch.device) -> Work:
    """`work` that is done many times; on CUDA and ROCm replayed as a graph from the second time on, elsewhere as it is.

    For loops of kernels so small that starting them takes longer than they do. A graph starts all of them at once and
    repeats what was recorded, so `work` must read nothing back, keep to the same tensors and numbers, and leave its
    results in them. Where recording fails, `work` goes on as it is, with a warning.
    """
    record = RECORDERS.get(device.type)
    return work if record is None else _Captured(work, record)


@dataclass(eq=False)
class _Captured:
    work: Work
    record: Callable[[Work], Work]
    seen: bool = False
    ready: Work | None = None

    def __call__(self) -> None:
        if self.seen and self.ready is None:  # the first time, libraries and tables were set up
            try:
                self.ready = self.record(self.work)
            except RuntimeError as error:
                self.ready = self.work
                log.warning("a loop runs without a graph, which is slower and changes nothing: %s", error)
        self.seen = True
        (self.ready or self.work)()


def _cuda_graph(work: Work) -> Work:
    """A CUDA graph of `work`, which is recorded and not done. Other threads may use the device meanwhile."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
    finally:
        torch.cuda.set_stream(stream)  # recording that fails leaves another one behind
    replay: Work = graph.replay
    return replay


#: What makes a graph of work, by the type of the device.
RECORDERS: dict[str, Callable[[Work], Work]] = {"cuda": _cuda_graph}
