"""Sweeps whose runs are other processes: what is gathered, what is told, and that one dead run takes no other along."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.errors import MissingConfigException

from dqx.command_line import explain
from dqx.config import CONF_DIR
from dqx.outcomes import Failure, failures

ROOT, TESTS = CONF_DIR.parent, Path(__file__).parent
QUICK = ["task=nano_facts", "task.limit=2", "outliers.samples=0", "fidelity.samples=0", "wandb.mode=disabled"]
FATAL = ["method=rtn", "method.rounding._target_=fatal.Fatal"]  # at 3 bits it is killed, at 5 it raises


def command(tmp_path: Path, *arguments: str) -> list[str]:
    folders = [f"cache_dir={tmp_path / 'cache'}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    return [sys.executable, "launch.py", "-m", *arguments, *QUICK, *folders]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]), "OMP_NUM_THREADS": "1", **more}


def sweep(tmp_path: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(tmp_path, *arguments), cwd=ROOT, capture_output=True, text=True, env=environment(**more)
    )


def check_fatal_sweep(done: subprocess.CompletedProcess[str], tmp_path: Path, *widths: int) -> None:
    """The runs at 3 and 5 bits failed and are told with their reasons, the others finished and are in the table."""
    assert done.returncode == 1, done.stderr
    folders = {w: tmp_path / "sweep" / f"{i}-nano_llada-rtn-w{w}a16" for i, w in enumerate(widths)}
    finished = [w for w, folder in folders.items() if (folder / "results.json").exists()]
    assert finished == [w for w in widths if w not in (3, 5)]
    _, _, listed = done.stderr.partition(f"2 of {len(widths)} runs failed:\n")
    assert f"  {folders[3].name}: it ended without results" in listed
    assert f"  {folders[5].name}: RuntimeError: too hot" in listed
    assert json.loads((folders[5] / "failure.json").read_text())["reason"] == "RuntimeError: too hot"
    assert "too hot" in (folders[5] / "run.log").read_text()
    table = done.stdout.rpartition("bits per")[2]
    assert len(finished) < 2 or all(f"rtn w{w}a16" in table for w in finished)
    results = json.loads((folders[finished[0]] / "results.json").read_text())
    assert results["command"].startswith("python launch.py method=rtn")


def test_runs_on_one_machine_and_one_that_dies(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    done = sweep(tmp_path, "hydra/launcher=local_gpus", "hydra.launcher.cpus_per_task=1", *FATAL, "bits=2,3,5")
    check_fatal_sweep(done, tmp_path, 2, 3, 5)
    assert done.stderr.count(" finished\n") == 1
    assert done.stderr.count(" failed\n") == 2


def test_outcomes_are_read_from_the_folders(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("finished", "refused", "killed", "never")]
    for folder in folders[:3]:
        folder.mkdir()
    (folders[0] / "results.json").write_text("{}")
    Failure("seed=-1 must be 0 or more", refused=True).write(folders[1])
    assert failures(folders) == {
        folders[1]: Failure("seed=-1 must be 0 or more", refused=True),
        folders[2]: Failure("it was killed"),
        folders[3]: Failure("it did not start"),
    }


def test_each_run_has_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five runs on three visible GPUs: no GPU has two runs at a time, and each is used again."""
    submitit = pytest.importorskip("submitit")
    from hydra_plugins.dqx_plugins.submitit import LocalQueue

    class Executor:
        def __init__(self, *_: object, **__: object) -> None:
            self.gpus: list[int] = []

        def update_parameters(self, visible_gpus: tuple[int, ...] = (), **_: object) -> None:
            self.gpus = list(visible_gpus)

        def submit(self, *_: object) -> SimpleNamespace:
            job = SimpleNamespace(gpus=self.gpus, finished=False)
            job.done = lambda: job.finished
            return job

    monkeypatch.setattr(submitit, "LocalExecutor", Executor)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    params = {"submitit_folder": str(tmp_path), "gpus_per_node": 1, "cpus_per_task": 1, "timeout_min": 1}
    queue, waiting = LocalQueue(params), [([], "", number, "", None) for number in range(5)]
    first = queue.start(None, waiting)
    assert [(number, job.gpus) for number, job in first] == [(0, [4]), (1, [5]), (2, [7])]
    assert queue.start(None, waiting) == []
    first[1][1].finished = True
    assert [(number, job.gpus) for number, job in queue.start(None, waiting)] == [(3, [5])]
    first[0][1].finished = first[2][1].finished = True
    assert [(number, job.gpus) for number, job in queue.start(None, waiting)] == [(4, [4])]
    assert waiting == []
    pairs = LocalQueue(params | {"gpus_per_node": 2})
    assert pairs.free == [[4, 5]]


@pytest.mark.parametrize(
    ("error", "choice"),
    [
        (MissingConfigException("", "hydra/launcher/submitit_slurm"), "slurm"),
        (MissingConfigException("", "hydra/launcher/submitit_local"), "local_gpus"),
        (RuntimeError("Unknown plugin class : 'hydra_plugins.dqx_plugins.ray.RayLauncher'"), "ray"),
    ],
)
def test_an_engine_that_is_not_installed(error: Exception, choice: str) -> None:
    (told,) = explain(error)
    assert f"hydra/launcher={choice} needs a package" in told
    assert f"pip install -e '.[{choice}]'" in told


def test_slurm_without_slurm(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    done = sweep(tmp_path, "hydra/launcher=slurm", "method=rtn", PATH=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "there is no sbatch here" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_stops_every_run(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    arguments = ["hydra/launcher=local_gpus", "hydra.launcher.cpus_per_task=1", "method=rtn", "bits=2,3,4,5,6,8"]
    with subprocess.Popen(
        command(tmp_path, *arguments, "task.limit=null"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    ) as launcher:
        while not list((tmp_path / "sweep").glob("*/run.log")):
            time.sleep(0.1)
        os.killpg(launcher.pid, signal.SIGINT)
        _, told = launcher.communicate(timeout=60)
    assert launcher.returncode == 130, told
    assert told.rstrip().endswith("interrupted")
    deadline = time.monotonic() + 30
    while alive := subprocess.run(["pgrep", "-g", str(launcher.pid)], capture_output=True, text=True).stdout:
        assert time.monotonic() < deadline, alive
        time.sleep(0.2)
