"""Devices and number types by the names that the configuration has for them, and which GPUs a run uses.

torch is imported where it is asked, so that a command line can be judged without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dqx.common.names import did_you_mean

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "auto")


def dtype_of(name: str) -> torch.dtype | None:
    """The number type of a name in DTYPES; None for `auto`, as stored."""
    import torch

    return None if name == "auto" else getattr(torch, name)


def pick_device(name: str) -> torch.device:
    """`auto` is this process's share of the accelerator, or the CPU."""
    import torch

    if name != "auto":
        return torch.device(name)
    from dqx.common import accelerator, processes

    kind = accelerator.kind()
    if kind is None or processes.on_cpu():
        return torch.device("cpu")
    return torch.device(kind, processes.state().local_process_index)


WAYS = ("auto", "shared", "separate")
ALONE = (
    "dispatch=separate gives each run of a sweep a GPU of its own, and this is a single run; add -m, or leave it out"
)


def dispatch_problems(dispatch: str, device: str, *, here: bool = True) -> Iterator[str]:
    """What is wrong with the setting; `here`, on the machine that runs it, also what it has too few GPUs for."""
    if dispatch in WAYS:
        return
    try:
        count = int(dispatch)
    except ValueError:
        yield f"dispatch={dispatch} is unknown; {did_you_mean(dispatch, WAYS)}, or a number of processes"
        return
    if count < 1:
        yield f"dispatch={dispatch} must be 1 or more processes, or one of {', '.join(WAYS)}"
    elif here and 0 < gpus(device) < count:
        if gpus() > gpus(device):
            yield f"dispatch={dispatch}, but model.device={device} is a single GPU; write model.device=auto"
        else:
            there = "1 GPU is" if gpus() == 1 else f"{gpus()} GPUs are"
            yield f"dispatch={dispatch}, but {there} visible here; give {gpus()} or less, or model.device=cpu"


def process_count(dispatch: str, device: str) -> int:
    """How many processes share a run in this place."""
    if dispatch in WAYS:
        return max(1, gpus(device))
    return int(dispatch)


def gpus(device: str = "auto") -> int:
    """How many GPUs a run with this `model.device` may use here."""
    if device == "cpu":
        return 0
    from dqx.common import accelerator

    there = accelerator.count()
    return there if device in ("auto", accelerator.kind()) else min(1, there)


def device_problems(name: str) -> Iterator[str]:
    """Why this machine has no such device."""
    if name == "auto":
        return
    import torch

    from dqx.common import accelerator

    try:
        device = torch.device(name)
    except RuntimeError:
        yield f"model.device={name} is no device; write auto, cpu, cuda, cuda:1 or xpu"
        return
    kind, count, called = device.type, accelerator.count(), device.type.upper()
    if kind in accelerator.UNFIT:
        yield f"model.device={name} is not supported: {accelerator.UNFIT[kind]}; write cpu or auto"
    elif kind != "cpu" and kind != accelerator.kind():
        yield f"model.device={name}, but torch {torch.__version__} finds no {called} device here; write cpu or auto"
    elif kind != "cpu" and (device.index or 0) >= count:
        yield f"model.device={name}, but there are {count} {called} devices, {kind}:0 to {kind}:{count - 1}"
