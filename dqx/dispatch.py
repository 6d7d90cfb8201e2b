"""How runs are shared out to the GPUs of this machine: the setting `dispatch`.

    auto       a single run is shared by all GPUs; in a sweep each run has one of its own, side by side
    shared     each run is shared by all GPUs, one run after the other
    separate   each run of a sweep has a GPU of its own, side by side: hydra/launcher=local_gpus
    2          each run is shared by so many processes, one per GPU; without GPUs they compute on the CPU

With one GPU or none `auto` and `shared` are one process, that of launch.py itself. Runs that a launcher starts
(hydra/launcher=slurm, ray, local_gpus) are shared by the GPUs that their job sees. Results do not depend
on any of this.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from dqx.config import Config
from dqx.names import did_you_mean

log = logging.getLogger(__name__)

WAYS = ("auto", "shared", "separate")
ALONE = (
    "dispatch=separate gives each run of a sweep a GPU of its own, and this is a single run; add -m, or leave it out"
)


STARTED = "launch.py starts the processes that share a run itself: leave out accelerate launch, and write dispatch={}"


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
            found = "1 GPU is" if gpus() == 1 else f"{gpus()} GPUs are"
            yield f"dispatch={dispatch}, but {found} visible here; give {gpus()} or less, or model.device=cpu"


def process_count(config: Config) -> int:
    """How many processes share a run in this place."""
    if config.dispatch in WAYS:
        return max(1, gpus(config.model.device))
    return int(config.dispatch)


def gpus(device: str = "auto") -> int:
    """How many GPUs a run with this `model.device` may use here."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return 0
    return torch.cuda.device_count() if device in ("auto", "cuda") else 1


def separate(dispatch: str, device: str, at_once: int, overrides: Sequence[str]) -> bool:
    """Whether the runs of a sweep, `at_once` of which are known at a time, are to be side by side.

    `overrides` are those of the sweep: where they vary `dispatch` itself, every run has its own way.
    """
    if any(o.startswith("dispatch=") and "," in o for o in overrides):
        return False
    if dispatch != "auto" or at_once < 2 or gpus(device) < 2:
        return dispatch == "separate"
    if find_spec("submitit") is None:
        log.info(f"each run is shared by {gpus(device)} GPUs; pip install -e '.[local_gpus]' for runs side by side")
        return False
    return True
