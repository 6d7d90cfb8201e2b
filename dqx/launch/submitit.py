"""Hydra's submitit launchers, with two differences.

A run that dies (killed, out of memory, out of time) is one failed run: the others are still waited for. And on one
machine a run waits for a free GPU, where submitit would start all of them at once on the first.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus

from dqx.common import devices
from dqx.config.schema import ConfigProblems
from dqx.launch.runs import announce, died, ended, vanished
from dqx.record.outcomes import failures, launched

try:
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
except ImportError:  # whoever chooses a launcher that needs it is told (dqx/config/mistakes.py)
    from hydra.plugins.launcher import Launcher as BaseSubmititLauncher

POLL = 0.5  # seconds between two looks at what is running
#: Settings that submitit has for every kind of cluster; the names of others begin with the kind.
SHARED = (
    "timeout_min",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "mem_gb",
    "nodes",
    "name",
    "stderr_to_stdout",
)

Call = tuple[list[str], str, int, str, Any]  # arguments of `BaseSubmititLauncher.__call__`, which runs one job


class QueueLauncher(BaseSubmititLauncher):
    """Starts runs where there is room and gathers what becomes of each. Itself sent to the jobs: keeps no state."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run every job. Ctrl-C cancels those that are queued or running."""
        queue = self.queue()
        waiting: list[Call] = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            waiting.append((list(overrides), "hydra.sweep.dir", number, str(number), Singleton.get_state()))
            announce(number, overrides)
        running: list[tuple[int, Any]] = []  # number and submitit's job
        returns: dict[int, JobReturn] = {}
        try:
            while waiting or running:
                running += queue.start(self, waiting)
                time.sleep(POLL)
                for number, job in [(number, job) for number, job in running if job.done()]:
                    running.remove((number, job))
                    found = result(number, job)
                    if found.status != JobStatus.COMPLETED and (queue.out_of_time(job) or told_of_timeout(number)):
                        limit = f"hydra.launcher.timeout_min={self.params['timeout_min']:g}"
                        found = died(number, f"timed out: it took longer than {limit}")
                    returns[number] = ended(number, found)
        except BaseException:
            for _, job in running:
                job.cancel(check=False)
            raise
        return [returns[number] for number in sorted(returns)]

    def queue(self) -> SlurmQueue | LocalQueue:
        raise NotImplementedError


def result(number: int, job: Any) -> JobReturn:
    """What a run gave back; a failure where its process ended without a word."""
    try:
        return job.results()[0]
    except Exception:  # submitit's
        return vanished(number, f"state {job.state}; its output: {job.paths.stderr}")


def told_of_timeout(number: int) -> bool:
    """Whether a run says that submitit stopped it because its time was nearly up."""
    folder = launched[number]
    return any("timed-out" in failure.reason for failure in failures([folder]).values())


class SlurmLauncher(QueueLauncher):
    """All runs as one job array of Slurm."""

    _EXECUTOR, elsewhere = "slurm", True

    def queue(self) -> SlurmQueue:
        if shutil.which("sbatch") is None:
            raise ConfigProblems(["hydra/launcher=slurm: there is no sbatch here; use it where you submit Slurm jobs"])
        return SlurmQueue(self.params)


class SlurmQueue:
    def __init__(self, params: dict[str, Any]):
        import submitit

        settings = {k if k in SHARED else f"slurm_{k}": v for k, v in params.items() if k != "submitit_folder"}
        retries = settings.pop("slurm_max_num_timeout")
        self.executor = submitit.AutoExecutor(params["submitit_folder"], cluster="slurm", slurm_max_num_timeout=retries)
        self.executor.update_parameters(**settings)

    def start(self, function: QueueLauncher, waiting: list[Call]) -> list[tuple[int, Any]]:
        """Submit everything. Returns numbers and jobs."""
        if not waiting:
            return []
        calls, waiting[:] = waiting[:], []
        jobs = self.executor.map_array(function, *zip(*calls, strict=True))
        return [(call[2], job) for call, job in zip(calls, jobs, strict=True)]

    def out_of_time(self, job: Any) -> bool:
        """Whether Slurm has stopped the job at its time limit."""
        return str(job.state).startswith("TIMEOUT")


class LocalLauncher(QueueLauncher):
    """As many runs at once as this machine has GPUs, each with its own; without GPUs, as the cores allow."""

    _EXECUTOR = "local"

    def queue(self) -> LocalQueue:
        return LocalQueue(self.params)


class LocalQueue:
    def __init__(self, params: dict[str, Any]):
        import submitit

        gpus, each, cores = visible_gpus(), params["gpus_per_node"] or 1, len(os.sched_getaffinity(0))
        if gpus and each > len(gpus):
            raise ConfigProblems([f"hydra.launcher.gpus_per_node={each}: this machine has {len(gpus)}"])
        self.free = [gpus[i : i + each] for i in range(0, len(gpus) - each + 1, each)]
        if not gpus:
            self.free = [[] for _ in range(max(1, cores // (params["cpus_per_task"] or 1)))]
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // len(self.free))))  # of the runs
        self.taken: list[tuple[Any, list[int]]] = []
        self.begun: dict[str, float] = {}  # by job
        self.log = Path(params["submitit_folder"]).parent / "processes.log"
        self.executor = submitit.LocalExecutor(params["submitit_folder"], max_num_timeout=0)
        warning = min(30, int(6 * params["timeout_min"]))  # seconds between asking a run to end and ending it
        self.executor.update_parameters(timeout_min=params["timeout_min"], signal_delay_s=warning)
        self.patience = 60 * params["timeout_min"] - warning

    def start(self, function: QueueLauncher, waiting: list[Call]) -> list[tuple[int, Any]]:
        """Start as many as there are free GPUs and take them off the list. Returns numbers and jobs."""
        for job, gpus in [(job, gpus) for job, gpus in self.taken if job.done()]:
            self.taken.remove((job, gpus))
            self.free.append(gpus)
        started = []
        while waiting and self.free:
            call, gpus = waiting.pop(0), self.free.pop(0)
            self.executor.update_parameters(visible_gpus=gpus, gpus_per_node=len(gpus))
            with errors_to(self.log):  # of the process beside each run, whose Ctrl-C is a traceback
                job = self.executor.submit(function, *call)
            self.taken.append((job, gpus))
            self.begun[job.job_id] = time.monotonic()
            started.append((call[2], job))
        return started

    def out_of_time(self, job: Any) -> bool:
        """Whether the job has run for as long as it may."""
        return time.monotonic() - self.begun[job.job_id] >= self.patience


@contextmanager
def errors_to(file: Path) -> Iterator[None]:
    """Processes started inside the block write their errors to the end of `file`."""
    terminal = os.dup(2)
    try:
        with file.open("ab") as log:
            os.dup2(log.fileno(), 2)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def visible_gpus() -> list[int]:
    """The GPUs that this process may use, by their numbers. Raises ConfigProblems where they have other names."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return list(range(devices.gpus()))
    names = [name for name in chosen.split(",") if name]
    if not all(name.isdigit() for name in names):
        raise ConfigProblems([f"CUDA_VISIBLE_DEVICES={chosen}: hydra/launcher=local_gpus needs numbers, as in 0,1,2"])
    return [int(name) for name in names]
