"""What became of the runs of one launch, in whichever process or on whichever machine they ran.

Nothing is told through memory: in a run's folder `results.json` stands for a finished run, `failure.json` says why a
run ended without one, and a run that left neither was killed or never started. What an earlier launch has left in the
folder does not count.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from dqx.common.files import disk_is_full, write_json
from dqx.common.heartbeat import STAGES

FILE = "failure.json"
RESULTS = "results.json"
LOG = "run.log"
KILLED = "it was killed"  # or is still running, where another launch has started it
AGAIN = "the same command goes on from here"

#: Settings with which less memory is taken when they are lower.
SMALLER = (
    "memory.gpu_gb or memory.ram_gb (quantization), likelihood.batch_tokens, batch_size of a task (answers), "
    "calib.length or fidelity.length (windows of text)"
)
MEMORY = f"usually because the machine ran out of memory: lower {SMALLER}, or run fewer processes at a time"
FREE = (
    "free some space on it (`dqx cache` lists what runs keep, `dqx cache prune --older-than DAYS` removes it), or put "
    "cache_dir and hydra.run.dir on another disk"
)
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "std::bad_alloc")

#: The run folders of this process's launch, in order; the sweepers and single runs fill it in.
launched: list[Path] = []
_before: dict[tuple[Path, str], tuple[int, int] | None] = {}  # files that were there before, by what changes with them
_unwritten: dict[Path, Failure] = {}  # of this process, where the disk was too full for a failure.json


@dataclass(frozen=True)
class Failure:
    """Why a run ended without results."""

    INTERRUPTED: ClassVar[str] = f"interrupted; {AGAIN}"

    reason: str
    refused: bool = False  # a mistake in the configuration or the files it names, told before anything heavy started

    @classmethod
    def of(cls, problems: Sequence[str], *, refused: bool = False) -> Failure:
        """The first of the problems, and how many there are besides."""
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        return cls(problems[0] + more, refused)

    def write(self, folder: Path) -> None:
        """Say so in the run's folder; on a full disk, at least to this process."""
        try:
            write_json(folder / FILE, asdict(self))
        except OSError as error:
            if not disk_is_full(error):
                raise
            _unwritten[folder] = self


@dataclass(frozen=True)
class RunState:
    """How a run ended: finished, reused (nothing had to be computed), failed, refused, interrupted, not started."""

    state: str
    reason: str = ""


class RunFailed(Exception):
    """A run has failed and said so. Stands for the error itself, which another process may be unable to unpickle."""


class RunEnded(Exception):
    """A run that did not end by itself: why it was ended or is gone, and the traceback where there is one."""

    def __init__(self, reason: str, traceback: str = ""):
        super().__init__(reason)
        self.traceback = traceback


def expect(folders: Iterable[Path]) -> None:
    """The runs of these folders are launched now."""
    for folder in folders:
        launched.append(folder)
        _before.update({(folder, name): _state(folder / name) for name in (FILE, RESULTS, LOG)})


def _state(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _is_new(folder: Path, name: str) -> bool:
    """Whether a file is of this launch."""
    state = _state(folder / name)
    return state is not None and state != _before.get((folder, name))


def failures(folders: Sequence[Path]) -> dict[Path, Failure]:
    """The runs without results, and why."""
    failed = {}
    for folder in folders:
        if _is_new(folder, FILE):
            failed[folder] = Failure(**json.loads((folder / FILE).read_text(encoding="utf-8")))
        elif folder in _unwritten:
            failed[folder] = _unwritten[folder]
        elif not _is_new(folder, RESULTS):
            failed[folder] = Failure(KILLED if _has_started(folder) else "it did not start")
    return failed


def outcomes(folders: Sequence[Path], interrupted: bool = False) -> dict[Path, RunState]:
    """How every run ended; `interrupted` is whether the launch was."""
    failed = failures(folders)
    return {folder: _outcome(folder, failed.get(folder), interrupted) for folder in folders}


def _outcome(folder: Path, failure: Failure | None, interrupted: bool) -> RunState:
    if failure is None:
        return RunState("reused" if _is_reused(folder) else "finished")
    if failure.reason == Failure.INTERRUPTED:
        return RunState("interrupted")
    if _is_new(folder, FILE) or folder in _unwritten:
        return RunState("refused" if failure.refused else "failed", failure.reason)
    if not _has_started(folder):
        return RunState("not started")
    return RunState("interrupted") if interrupted else RunState("failed", failure.reason)


def _has_started(folder: Path) -> bool:
    return _is_new(folder, LOG) if _before.get((folder, LOG)) else folder.exists()


def _is_reused(folder: Path) -> bool:
    """Whether a finished run had nothing to compute."""
    tasks = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["tasks"].values()
    return all(task[side].get("source") == "reused" for task in tasks for side in ("full_precision", "quantized"))


def stage_of(folder: Path) -> str | None:
    """The stage that a run was in when it last wrote to its run.log."""
    try:
        log = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    stages = re.findall(rf"^\S+ \S+ INFO {STAGES}: (.*)$", log, re.MULTILINE)
    return stages[-1] if stages else None


def manner(code: int | None, stage: str | None = None) -> str:
    """How a process ended that did not say why, and what to do.

    `code` is its exit code, a signal as a negative number, or None where nobody knows; `stage` what it was doing.
    """
    where = f" in '{stage}'" if stage else ""
    if code is None:
        return f"was killed or crashed{where}, {MEMORY}; {AGAIN}"
    if code >= 0:
        return f"ended without a word{where} (exit code {code}); {AGAIN}"
    number = -code
    name = f" ({signal.Signals(number).name})" if number in set(signal.Signals) else ""
    cause = f", {MEMORY}" if number == signal.SIGKILL else ""
    return f"was killed by signal {number}{name}{where}{cause}; {AGAIN}"


def why(error: BaseException) -> str:
    """An error in one line; where memory or a disk was short, with what takes less."""
    import traceback

    told = "".join(traceback.format_exception_only(error)).strip()
    first = f"{type(error).__name__}: {told.partition(': ')[2] or 'no message'}".splitlines()[0]
    short = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if short or (isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)):
        advice = next(iter(getattr(error, "__notes__", ())), f"lower {SMALLER}")
        return f"out of memory ({first}); {advice}"
    if disk_is_full(error):
        return f"the disk is full ({first}); {FREE}: what was kept before stays, and {AGAIN}"
    return told
