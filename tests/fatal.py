"""A rounding that ends its run in the middle: used by the tests of launchers."""

import os
import signal
import time
from dataclasses import dataclass

from dqx.quant.rounding.rtn import RTN


@dataclass(frozen=True)
class Fatal(RTN):
    """Round to nearest; but at 3 bits the process is killed, as when memory is short, and at 5 bits it raises.

    At 6 bits it goes on for ever, and so at 7 bits, where it does not listen either.
    """

    def __call__(self, w_OI, bits, *more):
        if bits.bits == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if bits.bits == 5:
            raise RuntimeError("too hot")
        if bits.bits in (6, 7):
            signal.signal(signal.SIGUSR2, signal.SIG_IGN if bits.bits == 7 else signal.getsignal(signal.SIGUSR2))
            while True:
                time.sleep(1)
        return super().__call__(w_OI, bits, *more)
