"""How runs are shared out to the GPUs of this machine: the setting `dispatch`.

    auto       a single run is shared by all GPUs; in a sweep each run has one of its own, side by side
    shared     each run is shared by all GPUs, one run after the other
    separate   each run of a sweep has a GPU of its own, side by side: hydra/launcher=local_gpus
    2          each run is shared by so many processes, one per GPU; without GPUs they compute on the CPU

With one GPU or none `auto` and `shared` are one process, that of launch.py itself. Runs that a launcher starts
(hydra/launcher=slurm, ray, local_gpus) are shared by the GPUs that their job sees. Results do not depend
on any of this.

dqx starts these processes itself: `accelerate launch launch.py ...` is refused with the command to type (`foreign.py`),
and what `accelerate config` has left on a machine does not count.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec

from dqx.common.devices import gpus

log = logging.getLogger(__name__)


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
