"""Sweeps whose runs are other processes: what is gathered, what is told, and that one dead run takes no other along."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.errors import MissingConfigException

from dqx.config.compose import compose, resolve
from dqx.config.mistakes import explain
from dqx.config.schema import CONF_DIR
from dqx.record.outcomes import Failure, failures
from dqx.study.experiment import problems

ROOT, TESTS = CONF_DIR.parent, Path(__file__).parents[1]
QUICK = ["task=nano_facts", "task.limit=2", "outliers.samples=0", "fidelity.samples=0", "wandb.mode=disabled"]
FATAL = [
    "method=rtn",
    "parts=[fatal]",
    "method.rounding._target_=fatal.Fatal",
]  # at 3 bits it is killed, at 5 it raises


def command(tmp_path: Path, *arguments: str) -> list[str]:
    folders = [f"cache_dir={tmp_path / 'cache'}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    names = {argument.partition("=")[0] for argument in arguments}
    quick = [setting for setting in QUICK if setting.partition("=")[0] not in names]
    return [sys.executable, "launch.py", "-m", *arguments, *quick, *folders]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]), "OMP_NUM_THREADS": "1", **more}


def run(arguments: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env=environment(**more))


def launched(arguments: list[str], **more: str) -> subprocess.Popen[str]:
    """A launcher in a process group of its own, as in a terminal."""
    pipe = subprocess.PIPE
    return subprocess.Popen(
        arguments, cwd=ROOT, stderr=pipe, text=True, env=environment(**more), start_new_session=True
    )


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def check_fatal_sweep(done: subprocess.CompletedProcess[str], tmp_path: Path, *widths: int) -> None:
    """The runs at 3 and 5 bits failed and are told with their reasons, the others finished and are in the table."""
    assert done.returncode == 1, done.stderr
    assert "Error executing job" not in done.stderr  # Hydra's words behind ours
    folders = {w: tmp_path / "sweep" / f"{i}-nano_llada-rtn-w{w}a16" for i, w in enumerate(widths)}
    finished = [w for w, folder in folders.items() if (folder / "results.json").exists()]
    assert finished == [w for w in widths if w not in (3, 5)]
    _, _, listed = done.stderr.partition(f"2 of {len(widths)} runs failed:\n")
    assert re.search(
        rf"  {folders[3].name}: it was killed or crashed in 'quantize'.*; the same command goes on", listed
    )
    assert f"  {folders[5].name}: RuntimeError: too hot" in listed
    assert json.loads((folders[5] / "failure.json").read_text())["reason"] == "RuntimeError: too hot"
    assert "too hot" in (folders[5] / "run.log").read_text()
    table = done.stdout.rpartition("bits/")[2]
    assert len(finished) < 2 or all(f"rtn w{w}a16" in table for w in finished)
    results = json.loads((folders[finished[0]] / "results.json").read_text())
    assert results["command"].startswith("python launch.py method=rtn")


def test_runs_on_one_machine_and_one_that_dies(tmp_path: Path) -> None:
    done = run(command(tmp_path, "hydra/launcher=local_gpus", "hydra.launcher.cpus_per_task=1", *FATAL, "bits=2,3,5"))
    check_fatal_sweep(done, tmp_path, 2, 3, 5)
    assert done.stdout.count("0-nano_llada-rtn-w2a16: ") == 1  # its line
    assert done.stderr.count("2-nano_llada-rtn-w5a16: RuntimeError: too hot\n") == 2  # its line, and the list


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
    import submitit

    from dqx.launch.submitit import LocalQueue

    class Executor:
        def __init__(self, *_: object, **__: object) -> None:
            self.gpus: list[int] = []

        def update_parameters(self, visible_gpus: tuple[int, ...] = (), **_: object) -> None:
            self.gpus = list(visible_gpus)

        def submit(self, *_: object) -> SimpleNamespace:
            job = SimpleNamespace(gpus=self.gpus, finished=False, job_id="1")
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
        (RuntimeError("Unknown plugin class : 'hydra_plugins.dqx.RayLauncher'"), "ray"),
    ],
)
def test_an_engine_that_is_not_installed(error: Exception, choice: str) -> None:
    (told,) = explain(error)
    assert f"hydra/launcher={choice} needs a package" in told
    assert f"pip install -e '.[{choice}]'" in told


def test_a_machine_that_only_launches_needs_no_device_and_no_checkpoint() -> None:
    config = resolve(compose(["model.device=cuda:99", "bits.weight.group_size=100"]))
    assert len(problems(config)) == 3
    assert all("group_size=100 does not divide" in problem for problem in problems(config, elsewhere=True))
    config.model.path = "/on/the/nodes/alone"
    assert problems(config, elsewhere=True) == []


def test_slurm_without_slurm(tmp_path: Path) -> None:
    done = run(command(tmp_path, "hydra/launcher=slurm", "method=rtn"), PATH=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "there is no sbatch here" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "group", "more"),
    [
        (signal.SIGINT, True, ["bits=2,3,4,5,6,8"]),
        (signal.SIGTERM, False, ["bits=2,3,4,5,6,8"]),
        (signal.SIGTERM, False, ["dispatch=2", "bits=2,3"]),
    ],
    ids=["Ctrl-C", "SIGTERM", "SIGTERM, two processes per run"],
)
def test_no_process_is_left(tmp_path: Path, number: int, group: bool, more: list[str]) -> None:
    """Ctrl-C reaches the launcher and its runs, SIGTERM the launcher alone."""
    arguments = ["hydra/launcher=local_gpus", "hydra.launcher.cpus_per_task=1", "method=rtn"]
    sweep = command(tmp_path, *arguments, "task.limit=null", *more)
    with launched(sweep, LAUNCHER=str(tmp_path)) as launcher:
        wait_for(lambda: any("evaluate" in log.read_text() for log in (tmp_path / "sweep").glob("*/run.log")))
        (os.killpg if group else os.kill)(launcher.pid, number)
        _, told = launcher.communicate(timeout=60)
    assert launcher.returncode == 130, told
    assert told.rstrip().endswith("interrupted; the same command goes on from here")
    wait_for(lambda: not with_in_its_environment(f"LAUNCHER={tmp_path}"))


def with_in_its_environment(setting: str) -> list[str]:
    """The processes that were started with it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if setting.encode() in path.read_bytes().split(b"\0"):
                found.append(path.parent.name)
    return found


@pytest.mark.slow
def test_a_run_that_takes_too_long(tmp_path: Path) -> None:
    """Also one that does not listen when it is told; the others have their time."""
    hangs = [
        "method=rtn",
        "parts=[fatal]",
        "method.rounding._target_=fatal.Fatal",
        "bits=w2a16",
        "bits.weight.bits=6,7,2",
        "hydra.launcher.timeout_min=1",
    ]
    done = run(command(tmp_path, "hydra/launcher=local_gpus", "hydra.launcher.cpus_per_task=1", *hangs))
    assert done.returncode == 1, done.stderr
    _, _, listed = done.stderr.partition("2 of 3 runs failed:\n")
    reason = "timed out: it took longer than hydra.launcher.timeout_min=1"
    for folder in ("0-nano_llada-rtn-w6a16", "1-nano_llada-rtn-w7a16"):
        assert f"  {folder}: {reason}" in listed
        assert json.loads((tmp_path / "sweep" / folder / "failure.json").read_text())["reason"] == reason
    assert (tmp_path / "sweep" / "2-nano_llada-rtn-w2a16" / "results.json").exists()


@pytest.mark.slow
def test_a_shared_run_again_through_a_launcher(tmp_path: Path) -> None:
    """The bundle's configuration reaches processes that know nothing of `--from`."""
    quick = ["method=rtn", "bits=w3a16", *QUICK, f"cache_dir={tmp_path / 'cache'}"]
    first = run([sys.executable, "launch.py", *quick, "seed=7", f"hydra.run.dir={tmp_path / 'run'}"])
    assert first.returncode == 0, first.stderr
    bundle = str(tmp_path / "run.dqx.zip")
    shared = run([sys.executable, "-m", "dqx", "share", str(tmp_path / "run"), "--to", bundle])
    assert shared.returncode == 0, shared.stderr
    places = [f"cache_dir={tmp_path / 'cache'}", f"hydra.sweep.dir={tmp_path / 'sweep'}", "wandb.mode=disabled"]
    again = ["launch.py", "--from", bundle, "-m", "hydra/launcher=local_gpus", "bits.weight.bits=3,4", *places]
    done = run([sys.executable, *again])
    assert done.returncode == 0, done.stderr
    same, other = (
        json.loads((path / "results.json").read_text()) for path in sorted((tmp_path / "sweep").glob("[01]-*"))
    )
    assert [(found["bits"], found["seed"]) for found in (same, other)] == [("w3a16", 7), ("w4a16", 7)]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert same["deltas"] == results["deltas"]
    assert same["command"] == f"python launch.py --from {bundle} bits.weight.bits=3 {places[0]} wandb.mode=disabled"


# ---- a Slurm and a Ray on this machine -----------------------------------------------------------------------


def documented(tmp_path: Path, start: str, *more: str) -> list[str]:
    """The command of conf/hydra/launcher/README.md that begins so, with less of everything."""
    text = (CONF_DIR / "hydra" / "launcher" / "README.md").read_text()
    (line,) = re.findall(rf"^python launch.py -m ({re.escape(start)}.*)$", text, re.MULTILINE)
    return command(tmp_path, *line.split(), "calib.samples=2", "calib.length=64", *more)


def check_documented_sweep(done: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    assert done.returncode == 0, done.stderr
    names = [
        "0-nano_llada-gptq-w3a16",
        "1-nano_llada-gptq-w4a16",
        "2-nano_llada-awq-w3a16",
        "3-nano_llada-awq-w4a16",
    ]
    assert sorted(path.parent.name for path in (tmp_path / "sweep").glob("*/results.json")) == names
    assert all(f"{method} w{width}a16" in done.stdout for method in ("gptq", "awq") for width in (3, 4))


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment of a Slurm that is up."""
    if not (shutil.which("slurmctld") and shutil.which("munged")):
        pytest.skip("Slurm is not installed (apt-get install --no-install-recommends slurm-wlm munge)")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons are started as root")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        try:
            subprocess.run([TESTS / "slurm.sh", "start", folder], check=True, timeout=60)
            yield {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{folder}/bin:{os.environ['PATH']}"}
        finally:
            subprocess.run([TESTS / "slurm.sh", "stop", folder], check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.cluster
def test_slurm_as_documented(slurm: dict[str, str], tmp_path: Path) -> None:
    done = run(documented(tmp_path, "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=2"), **slurm)
    check_documented_sweep(done, tmp_path)


@pytest.mark.slow
@pytest.mark.cluster
def test_slurm_and_runs_that_die(slurm: dict[str, str], tmp_path: Path) -> None:
    done = run(
        command(tmp_path, "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=2", *FATAL, "bits=2,3,4,5"), **slurm
    )
    check_fatal_sweep(done, tmp_path, 2, 3, 4, 5)
    assert "state FAILED" in done.stderr


@pytest.mark.slow
@pytest.mark.cluster
def test_ctrl_c_cancels_the_jobs(slurm: dict[str, str], tmp_path: Path) -> None:
    arguments = ["hydra/launcher=slurm", "hydra.launcher.array_parallelism=1", "method=rtn", "bits=2,3,4"]
    with launched(command(tmp_path, *arguments, "task.limit=null"), **slurm) as launcher:
        wait_for(lambda: list((tmp_path / "sweep").glob("*/run.log")))
        os.killpg(launcher.pid, signal.SIGINT)
        _, told = launcher.communicate(timeout=60)
    assert launcher.returncode == 130, told
    queue = ["squeue", "--noheader"]
    wait_for(lambda: not subprocess.run(queue, capture_output=True, env=environment(**slurm)).stdout.strip())


@pytest.fixture(scope="module")
def ray() -> dict[str, str]:
    """The environment in which a Ray may start on this machine."""
    pytest.importorskip("ray", reason="Ray is not installed (pip install -e '.[ray]')")
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="pip install -e '.[ray]'")
    return {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


@pytest.mark.slow
@pytest.mark.cluster
def test_ray_as_documented(ray: dict[str, str], tmp_path: Path) -> None:
    done = run(documented(tmp_path, "hydra/launcher=ray method=", "hydra.launcher.ray.init.num_cpus=2"), **ray)
    check_documented_sweep(done, tmp_path)


@pytest.mark.slow
@pytest.mark.cluster
def test_ray_and_runs_that_die(ray: dict[str, str], tmp_path: Path) -> None:
    start = ["hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=2"]
    done = run(command(tmp_path, *start, *FATAL, "bits=2,3,4,5"), **ray)
    check_fatal_sweep(done, tmp_path, 2, 3, 4, 5)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_ray_that_is_up(ray: dict[str, str], tmp_path: Path) -> None:
    """`ray start` and `ray stop` around the documented command; the cluster outlives the sweep."""
    cli = [sys.executable, "-m", "ray.scripts.scripts"]
    start = [*cli, "start", "--head", "--port=6379", "--num-cpus=2", "--include-dashboard=false"]
    subprocess.run(start, check=True, capture_output=True, env=environment(**ray), cwd=tmp_path)
    try:
        done = run(documented(tmp_path, "hydra/launcher=ray hydra.launcher.ray.init.address=auto"), **ray)
        check_documented_sweep(done, tmp_path)
        subprocess.run([*cli, "status"], check=True, capture_output=True, env=environment(**ray))
    finally:
        subprocess.run([*cli, "stop", "--force"], check=True, capture_output=True, env=environment(**ray))
