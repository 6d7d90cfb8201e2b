"""The processes that share a run, seen from launch.py: started, watched, ended, and why they failed.

However they end, with their run, by a failure of one, by Ctrl-C or with launch.py itself, none is left: each has the
reading end of a pipe for its standard input, and leaves when launch.py no longer holds the other end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from dqx.common import heartbeat
from dqx.common.devices import gpus
from dqx.common.heartbeat import Sign
from dqx.config.schema import ConfigProblems
from dqx.launch.workers import messages
from dqx.launch.workers.messages import Report, SharedRun
from dqx.record.outcomes import RunEnded, manner

POLL = 0.2  # seconds between two looks at the processes
STARTUP = 600.0  # seconds that all of them may take to begin
GRACE = 10.0  # seconds to leave, before they are killed
DUMP = 1.0  # seconds to write down where they hang


def share(job: SharedRun) -> None:
    """Have the job done by its processes; its record is written when this returns.

    Raises ConfigProblems for what they found wrong with the configuration or its files, RunEnded for anything else.
    """
    with TemporaryDirectory(prefix="dqx-") as place:
        folder = Path(place)
        job.write(folder)
        with started(job, folder) as launcher:
            hung = watch(job, folder, launcher)
        if hung:
            raise RunEnded(hung)
        if launcher.returncode:
            raise failure(job, folder, launcher.returncode)


@contextmanager
def started(job: SharedRun, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher of the processes; at the end of the block neither it nor they are left."""
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // job.processes)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    if not gpus(job.config.model.device):
        environment["ACCELERATE_USE_CPU"] = "true"
    sys.stdout.flush()
    launcher = subprocess.Popen(
        [sys.executable, "-m", "dqx.launch.workers.start", str(folder), str(job.processes), str(threads)],
        stdin=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches launch.py alone, which ends the others
    )
    try:
        yield launcher
    finally:
        assert launcher.stdin is not None
        launcher.stdin.close()
        if launcher.poll() is None:
            for sign in signs(job, folder).values():
                with suppress(ProcessLookupError):
                    os.killpg(sign.pid, signal.SIGKILL)
            try:
                launcher.wait(GRACE)
            except subprocess.TimeoutExpired:
                launcher.kill()
                launcher.wait()


def signs(job: SharedRun, folder: Path) -> dict[int, Sign]:
    """What the processes that have begun tell of themselves, by rank."""
    found = {rank: heartbeat.read(folder / f"{rank}.sign") for rank in range(job.processes)}
    return {rank: sign for rank, sign in found.items() if sign is not None}


def watch(job: SharedRun, folder: Path, launcher: subprocess.Popen[bytes]) -> str:
    """Wait for the processes. Returns why they must be ended: none has moved for `hang_minutes`; else nothing."""
    known: dict[int, Sign] = {}
    moved = {-1: time.monotonic()}  # by rank, on a clock that nobody sets and that sleeps with the machine
    while launcher.poll() is None:
        time.sleep(POLL)
        now = signs(job, folder)
        moved |= {rank: time.monotonic() for rank, sign in now.items() if sign != known.get(rank)}
        known = now
        if time.monotonic() - max(moved.values()) > patience(job, known):
            for sign in known.values():
                with suppress(ProcessLookupError):
                    os.kill(sign.pid, signal.SIGUSR1)
            time.sleep(DUMP)
            return hang(job, known, moved)
    return ""


def patience(job: SharedRun, known: dict[int, Sign]) -> float:
    """Seconds without a move after which the run hangs: the longer while processes begin, on a busy machine slowly."""
    minutes = job.config.hang_minutes
    seconds = float("inf") if minutes is None else 60 * minutes
    begun = [sign for sign in known.values() if sign.stage != heartbeat.STARTING]
    return seconds if len(begun) == job.processes else max(seconds, STARTUP)


def hang(job: SharedRun, known: dict[int, Sign], moved: dict[int, float]) -> str:
    """Why a run that hangs was ended: what each process was doing, and since when."""
    now, clock = datetime.now(), time.monotonic()
    seen = [
        f"process {rank + 1} in '{known[rank].stage}' since {now - timedelta(seconds=clock - moved[rank]):%H:%M:%S}"
        if rank in known
        else f"process {rank + 1} has not begun"
        for rank in range(job.processes)
    ]
    minutes = patience(job, known) / 60
    return f"it hung: nothing moved for {minutes:g} minutes ({', '.join(seen)}); where they hung is in run.log"


def failure(job: SharedRun, folder: Path, code: int) -> Exception:
    """What the processes failed of. That of the first counts, unless all it says is that another one was gone."""
    told, ended = messages.reports(folder, job.processes), messages.deaths(folder)
    own = [report for report in told if not report.lost]
    stages = {rank: sign.stage for rank, sign in signs(job, folder).items()}
    silent = [death for death in ended if death.rank not in {report.rank for report in told}]
    if own:
        return _reported(job, own[0])
    if silent:
        rank = silent[0].rank
        return RunEnded(f"process {rank + 1} of {job.processes} {manner(silent[0].code, stages.get(rank))}")
    if told:
        return _reported(job, told[0])
    if code < 0 or stages:
        return RunEnded(f"the process that starts the {job.processes} of this run {manner(code, stages.get(0))}")
    return RunEnded(f"its {job.processes} processes could not be started (exit code {code})")


def _reported(job: SharedRun, report: Report) -> Exception:
    if report.problems:
        return ConfigProblems(report.problems)
    return RunEnded(f"process {report.rank + 1} of {job.processes} failed: {report.reason}", report.traceback)
