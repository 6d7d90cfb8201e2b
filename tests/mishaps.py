"""Roundings that end their run in the middle: used by the tests of runs that several processes share.

The last process meets with the mishap, the others wait for it; `MISHAP_OVER` names a file that ends it.
"""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dqx.common.processes import processes
from dqx.quant.rounding.rtn import RTN


@dataclass(frozen=True)
class Mishap(RTN):
    """Round to nearest; but in the last of several processes something else happens first."""

    kind: str = "none"  # none, killed, raises, hangs, memory

    def __call__(self, w_OI, bits, *more):
        over = os.environ.get("MISHAP_OVER")
        team = processes()
        if team.rank == team.count - 1 and not (over and Path(over).exists()):
            getattr(self, self.kind)()
        return super().__call__(w_OI, bits, *more)

    def none(self):
        pass

    def killed(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def raises(self):
        raise RuntimeError("too hot")

    def hangs(self):
        while True:
            time.sleep(1)

    def memory(self):
        torch.empty(1 << 50)
