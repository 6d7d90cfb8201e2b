"""One of the processes that share a run: `python -m dqx.launch.workers.worker FOLDER`, started by `start.py`.

The main one (rank 0) prints and writes; what others print, warnings of libraries say, is found in run.log.
"""

from __future__ import annotations

import faulthandler
import logging.config
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path

from dqx.common import heartbeat
from dqx.common.files import disk_is_full
from dqx.launch.workers.messages import Report, SharedRun
from dqx.record.outcomes import LOG, why


def main(folder: Path) -> int:
    """Returns the exit code; why it is not 0 lies in the folder."""
    threading.Thread(target=leave_with_launch, daemon=True).start()
    rank = int(os.environ["RANK"])
    heartbeat.start(folder / f"{rank}.sign")
    job = SharedRun.read(folder)
    with (job.folder / LOG).open("a") as log:
        faulthandler.register(signal.SIGUSR1, log)  # `team.py` asks for it before it ends a run that hangs
        if rank:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        elif job.logging:
            logging.config.dictConfig(job.logging)
        return work(job, folder, rank)


def work(job: SharedRun, folder: Path, rank: int) -> int:
    """Run the job. Returns the exit code."""
    from dqx.common.processes import Lost, processes, state
    from dqx.config.schema import ConfigProblems
    from dqx.models.checkpoint import CheckpointError
    from dqx.study.run import run

    try:
        if processes().count != job.processes:
            raise RuntimeError(f"{job.processes} processes were to share this run, but {processes().count} do")
        run(job.config, job.folder, job.origin)
        state().destroy_process_group()
        return 0
    except BaseException as error:
        problems = error.problems if isinstance(error, ConfigProblems) else [str(error)]
        mistake = isinstance(error, (ConfigProblems, CheckpointError))
        with suppress(OSError):  # of a full disk
            Report(
                rank,
                why(error),
                "" if disk_is_full(error) else traceback.format_exc(),
                problems=problems if mistake else [],
                lost=isinstance(error, Lost),
            ).write(folder)
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(1)  # at once: on the way out, libraries wait for processes that wait for this one


def leave_with_launch() -> None:
    """End this process when launch.py has ended, however that came about: then nobody holds the other end of stdin."""
    os.read(sys.stdin.fileno(), 1)  # past Python's buffer, whose lock would be missed at this process's own end
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
