"""A run in a process of its own, or one after the other in that of launch.py: ended too when it hangs.

The clock is in the process itself, so it stops what Python can interrupt (a lock, a file system, the network) and the
sweep goes on with the next run. What it cannot interrupt, say a GPU that no longer answers, ends the whole process.
"""

from __future__ import annotations

import faulthandler
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from dqx.common import heartbeat
from dqx.record.outcomes import RunEnded

GRACE = 60.0  # seconds to react, before the process is ended


@contextmanager
def watched(minutes: float | None, log: Path) -> Iterator[None]:
    """Raise RunEnded in the block when nothing in it has moved for so long (None: never); `log` tells where it was."""
    if minutes is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    limit = 60 * minutes
    with log.open("a") as file:

        def look(*_: object) -> None:
            idle = heartbeat.idle()
            if idle < limit:
                set_clock(limit - idle)
                return
            faulthandler.dump_traceback(file)
            since = datetime.now() - timedelta(seconds=idle)
            stage = f"in '{heartbeat.stage_now()}' since {since:%H:%M:%S}"
            raise RunEnded(f"it hung: nothing moved for {minutes:g} minutes ({stage}); where it hung is in run.log")

        def set_clock(seconds: float) -> None:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=file)

        before = signal.signal(signal.SIGALRM, look)
        heartbeat.stage(heartbeat.STARTING)
        set_clock(limit)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            signal.signal(signal.SIGALRM, before)
