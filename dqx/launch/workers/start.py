"""accelerate's launcher as a process of its own: `python -m dqx.launch.workers.start FOLDER PROCESSES THREADS`.

It starts the processes of a run and waits. When one fails, it ends the others and notes how each of them ended: only
the parent of a process can tell that it was killed, and by what.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from accelerate.commands.launch import launch_command_parser, multi_gpu_launcher
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from dqx.launch.workers.messages import Death, write_deaths


def main(folder: Path, processes: str, threads: str) -> int:
    """Returns the exit code."""
    options = ["--multi_gpu", "--num_processes", processes, "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", threads]
    options += ["--log_dir", str(folder), "-m", "dqx.launch.workers.worker", str(folder)]
    logging.disable(logging.CRITICAL)  # what the launchers say about it, launch.py says in fewer words
    try:  # without `accelerate launch` around it, which would mix in what `accelerate config` has left on this machine
        multi_gpu_launcher(launch_command_parser().parse_args(options))
    except ChildFailedError as error:
        ended = sorted(
            error.failures.items(), key=lambda item: (item[1].timestamp, item[1].exitcode == -signal.SIGTERM)
        )
        write_deaths(folder, [Death(rank, failure.exitcode) for rank, failure in ended])
        return 1
    except SignalException as error:  # the processes are ended; who waits for this one shall see what ended it
        signal.signal(error.sigval, signal.SIG_DFL)
        os.kill(os.getpid(), error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
