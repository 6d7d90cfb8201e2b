"""Signs of life: where a run gets on with its work it says so, and whoever watches it can tell work from a hang.

`beat` stands where work is done: after a block's forward, a generated program, while another run is waited for. Nothing
beats by the clock alone.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

EVERY = 0.5  # seconds between two notes
STAGES = "dqx.stages"  # the logger that tells of them, so that run.log has them
STARTING = "starting"  # the stage before the first one of the run

_file: Path | None = None  # whose modification time is the last beat, where another process watches
_stage, _moved, _noted = STARTING, 0.0, 0.0  # what is going on, and seconds of the monotonic clock


@dataclass(frozen=True)
class Sign:
    """What a process has told: who it is, what it is doing, and when it last got on with it."""

    pid: int
    stage: str
    moved: int  # nanoseconds, as the file system counts them


def start(file: Path) -> None:
    """Note from now on, in `file`, that this process is at work."""
    global _file
    _file = file
    stage(STARTING)


def stage(name: str) -> None:
    """A new part of the run begins."""
    global _stage, _moved
    _stage, _moved = name, time.monotonic()
    if _file is not None:
        new = _file.with_suffix(".new")
        with suppress(OSError):  # the folder goes when the process that watches is gone
            new.write_text(json.dumps([os.getpid(), name]), encoding="utf-8")
            new.replace(_file)


def beat() -> None:
    """Some work has been done."""
    global _moved, _noted
    _moved = time.monotonic()
    if _file is not None and _moved - _noted >= EVERY:
        _noted = _moved
        with suppress(OSError):
            os.utime(_file)


def stage_now() -> str:
    """What this process is doing."""
    return _stage


def idle() -> float:
    """Seconds since this process last got on with it."""
    return time.monotonic() - _moved


def read(file: Path) -> Sign | None:
    """What a process has told, None where it has not begun."""
    try:
        pid, name = json.loads(file.read_text(encoding="utf-8"))
        return Sign(pid, name, file.stat().st_mtime_ns)
    except FileNotFoundError:
        return None
