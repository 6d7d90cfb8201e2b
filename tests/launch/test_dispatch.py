"""Runs that several processes share, started by launch.py: the results of one process, and what becomes of mishaps."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from dqx.common import accelerator, heartbeat
from dqx.common.devices import dispatch_problems, process_count
from dqx.config.compose import compose, resolve, restored
from dqx.config.schema import CONF_DIR
from dqx.evaluate.results import TaskResult
from dqx.launch import dispatch, foreign
from dqx.launch.dispatch import separate
from dqx.launch.workers import team
from dqx.launch.workers.alone import watched
from dqx.launch.workers.messages import Death, write_deaths
from dqx.record import outcomes
from dqx.record.folder import Record, RunFolder
from dqx.record.outcomes import Failure, RunEnded, RunState, why
from dqx.report.terminal import print_outcomes
from dqx.study.run import run

ROOT, TESTS = CONF_DIR.parent, Path(__file__).parents[1]
RUN = [
    *(
        "method=rtn",
        "bits=w3a16",
        "parts=[mishaps]",
        "method.rounding._target_=mishaps.Mishap",
        "task=[nano_facts,nano_sums]",
    ),
    *("task.limit=3", "outliers.samples=0", "fidelity.samples=0", "wandb.mode=disabled"),
]


def command(tmp_path: Path, *arguments: str) -> list[str]:
    """The arguments, `-m` first where it is among them, after those that all runs have."""
    places = [f"cache_dir={tmp_path / 'cache'}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    sweep = arguments[:1] == ("-m",)
    first = arguments[:1] if sweep else (f"hydra.run.dir={tmp_path / 'run'}",)
    names = {argument.partition("=")[0] for argument in arguments}
    usual = [setting for setting in RUN if setting.partition("=")[0] not in names]
    return [sys.executable, "launch.py", *first, *usual, *arguments[sweep:], *places]


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """Temporary files, whose names processes have on their command lines, lie in the test's own folder."""
    (tmp_path / "tmp").mkdir(exist_ok=True)
    path = os.pathsep.join([str(ROOT), str(TESTS)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "tmp"), **more}


def launch(tmp_path: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The launch from its start to its end, which leaves nothing behind."""
    done = subprocess.run(
        command(tmp_path, *arguments), cwd=ROOT, capture_output=True, text=True, env=environment(tmp_path, **more)
    )
    nothing_is_left(tmp_path)
    return done


def launched(tmp_path: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """A launch that goes on, in a process group of its own, as in a terminal."""
    return subprocess.Popen(
        command(tmp_path, *arguments),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path, **more),
        start_new_session=True,
    )


def living(tmp_path: Path) -> list[str]:
    """The command lines of processes that work for this test."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if str(tmp_path) in line and int(path.parent.name) != os.getpid():
            found.append(line)
    return found


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def nothing_is_left(tmp_path: Path) -> None:
    wait_for(lambda: not living(tmp_path))
    assert not [path.name for path in (tmp_path / "tmp").iterdir() if path.name.startswith("dqx-")]


def same(found: Record, expected: Record) -> None:
    """Equal results: predictions and scores to the letter, likelihoods but for the rounding of float32 logits.

    A logit of 16 is known to 1e-6, so a likelihood near 0 nats has no more digits than that.
    """
    for side in ("full_precision", "quantized"):
        for name, other in getattr(expected, side).items():
            one: TaskResult = getattr(found, side)[name]
            assert one.value == pytest.approx(other.value, rel=1e-5)
            for a, b in zip(one.documents, other.documents, strict=True):
                assert (a.doc_id, a.prediction, a.score) == (b.doc_id, b.prediction, b.score)
                assert a.log_likelihoods == (b.log_likelihoods and pytest.approx(b.log_likelihoods, rel=1e-5, abs=2e-6))


def alone(tmp_path: Path) -> Record:
    """What a single process gives, computed in this one."""
    overrides = [*RUN, "+method.rounding.kind=none", f"cache_dir={tmp_path / 'alone' / 'cache'}"]
    return run(resolve(compose(overrides)), tmp_path / "alone" / "run")


def failure(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "failure.json").read_text())


def test_shared_runs_are_those_of_one_process_and_one_that_is_killed_takes_no_other_along(tmp_path: Path) -> None:
    done = launch(tmp_path, "-m", "dispatch=2", "+method.rounding.kind=killed,none")
    assert "Error executing job" not in done.stderr  # Hydra's words behind ours
    assert done.returncode == 1, done.stderr
    killed, finished = (tmp_path / "sweep" / f"{i}-nano_llada-rtn-w3a16" for i in range(2))
    found = RunFolder(finished).read()
    same(found, alone(tmp_path))
    assert found.environment["processes"] == 2
    assert found.command.startswith("python launch.py method=rtn")
    assert found.choices["bits"] == "w3a16"
    reason = failure(killed)["reason"]
    assert reason.startswith("process 2 of 2 was killed by signal 9 (SIGKILL) in 'quantize', usually because the mach")
    assert failure(killed) == {"reason": reason, "refused": False}
    assert not (killed / "results.json").exists()
    assert f"1 of 2 runs failed:\n  {killed.name}: {reason}\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count(f"{finished.name}: ") == 1  # a run of a sweep has one line
    states = [line.split() for line in done.stdout.splitlines()]
    assert [killed.name, "failed", "process", "2"] in [words[:4] for words in states]
    assert ["Runs:", "1", "finished,", "1", "failed"] in [words[:5] for words in states]


@pytest.mark.slow
def test_three_processes_give_the_results_of_one(tmp_path: Path) -> None:
    done = launch(tmp_path, "dispatch=3", "+method.rounding.kind=none")
    assert done.returncode == 0, done.stderr
    found = RunFolder(tmp_path / "run").read()
    assert found.environment["processes"] == 3
    same(found, alone(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "killed",
            "process 2 of 2 was killed by signal 9 (SIGKILL) in 'quantize', usually because the machine ran out",
        ),
        ("raises", "process 2 of 2 failed: RuntimeError: too hot"),
        ("memory", "process 2 of 2 failed: out of memory (RuntimeError: "),
        ("hangs", "it hung: nothing moved for 0.5 minutes (process 1 in 'quantize' since "),
    ],
    ids=["killed", "raises", "memory", "hangs"],
)
def test_a_mishap_ends_the_run_which_completes_when_it_is_started_again(tmp_path: Path, kind: str, reason: str) -> None:
    """Results that an earlier run has left in the folder do not stand for this one."""
    over, arguments = tmp_path / "over", ("dispatch=2", f"+method.rounding.kind={kind}", "hang_minutes=0.5")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    done = launch(tmp_path, *arguments, MISHAP_OVER=str(over))
    assert done.returncode == 1, done.stderr
    assert failure(tmp_path / "run")["reason"].startswith(reason)
    assert f"the run failed: {reason}" in done.stderr
    assert not (tmp_path / "run" / "results.json").exists()
    log = (tmp_path / "run" / "run.log").read_text()
    assert reason in log
    if kind in ("raises", "memory"):
        assert "Traceback (most recent call last)" in log
        assert f"in {kind}\n" in log  # where it was raised
    elif kind == "hangs":
        assert "mishaps.py" in log.partition("most recent call first")[2]  # where it hung
    over.touch()
    done = launch(tmp_path, *arguments, MISHAP_OVER=str(over))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "failure.json").exists()
    found = RunFolder(tmp_path / "run").read()
    assert set(found.sources["full_precision"].values()) == {"reused"}  # computed before the mishap
    same(found, alone(tmp_path))


@pytest.mark.parametrize(
    ("code", "ended", "stages", "told"),
    [
        (
            1,
            Death(1, -9),
            {0: "quantize", 1: "quantize"},
            "process 2 of 2 was killed by signal 9 (SIGKILL) in 'quantize'",
        ),
        (
            1,
            Death(0, -11),
            {0: "read the data"},
            "process 1 of 2 was killed by signal 11 (SIGSEGV) in 'read the data'; ",
        ),
        (1, Death(1, -9), {}, "process 2 of 2 was killed by signal 9 (SIGKILL), usually because the machine ran out"),
        (
            -9,
            None,
            {0: "quantize"},
            "the process that starts the 2 of this run was killed by signal 9 (SIGKILL) in 'qu",
        ),
        (-15, None, {}, "the process that starts the 2 of this run was killed by signal 15 (SIGTERM); the same"),
        (
            1,
            None,
            {0: "quantize"},
            "the process that starts the 2 of this run ended without a word in 'quantize' (exit",
        ),
        (1, None, {}, "its 2 processes could not be started (exit code 1)"),
    ],
)
def test_a_killed_process_is_told_as_one(
    tmp_path: Path, code: int, ended: Death | None, stages: dict[int, str], told: str
) -> None:
    """By which signal, in which stage, and what to do."""
    if ended:
        write_deaths(tmp_path, [ended])
    for rank, stage in stages.items():
        (tmp_path / f"{rank}.sign").write_text(json.dumps([1, stage]))
    job: Any = SimpleNamespace(processes=2)
    reason = str(team.failure(job, tmp_path, code))
    assert reason.startswith(told)
    if "killed" in told:
        assert reason.endswith("; the same command goes on from here")
    assert ("likelihood.batch_tokens" in reason) == ("SIGKILL" in reason)


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_the_process_that_starts_the_others_is_killed(tmp_path: Path, end: signal.Signals) -> None:
    going = launched(tmp_path, "dispatch=2", "+method.rounding.kind=hangs")
    wait_for(
        lambda: (tmp_path / "run" / "run.log").exists() and "quantize" in (tmp_path / "run" / "run.log").read_text()
    )
    (starter,) = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if f"dqx.launch.workers.start\0{tmp_path}" in path.read_bytes().decode(errors="replace")
    ]
    os.kill(starter, end)
    _, told = going.communicate(timeout=120)
    assert going.returncode == 1, told
    reason = f"the process that starts the 2 of this run was killed by signal {end.value} ({end.name}) in 'quantize'"
    assert f"the run failed: {reason}" in told
    assert failure(tmp_path / "run")["reason"].startswith(reason)
    nothing_is_left(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_launch(tmp_path: Path, end: signal.Signals) -> None:
    """Ctrl-C, which the terminal sends to the whole group; a polite request, and a rude one, to launch.py alone."""
    arguments = ("-m", "dispatch=2", "+method.rounding.kind=hangs,none")
    with launched(tmp_path, *arguments) as process:
        log = tmp_path / "sweep" / "0-nano_llada-rtn-w3a16" / "run.log"
        wait_for(lambda: log.exists() and "quantizing" in log.read_text())
        (os.killpg if end == signal.SIGINT else os.kill)(process.pid, end)
        _, told = process.communicate(timeout=30)
    if end == signal.SIGKILL:
        wait_for(lambda: not living(tmp_path))
        return
    nothing_is_left(tmp_path)
    assert process.returncode == 130
    assert told.rstrip().endswith("interrupted; the same command goes on from here")
    assert "Traceback" not in told
    (failure,) = (tmp_path / "sweep").glob("*/failure.json")  # of the run that was going on
    assert json.loads(failure.read_text())["reason"] == Failure.INTERRUPTED


@pytest.mark.slow
def test_runs_side_by_side_end_with_launch(tmp_path: Path) -> None:
    """dispatch=separate starts launchers and runs as processes; all of them go on SIGTERM."""
    over = tmp_path / "over"
    arguments = ("-m", "dispatch=separate", "+method.rounding.kind=hangs,none")
    with launched(tmp_path, *arguments, MISHAP_OVER=str(over)) as process:
        log = tmp_path / "sweep" / "0-nano_llada-rtn-w3a16" / "run.log"
        wait_for(lambda: log.exists() and "quantizing" in log.read_text())
        process.terminate()
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in told
    wait_for(lambda: not living(tmp_path))


@pytest.mark.slow
def test_a_mistake_that_only_the_processes_find_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    done = launch(tmp_path, "dispatch=2", "outliers.samples=1", f"calib.text={tmp_path / 'short.txt'}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(f"cannot run: calib.text={tmp_path / 'short.txt'}: ") == 1
    assert "Traceback" not in done.stderr
    assert failure(tmp_path / "run")["refused"]


# ---- accelerate launch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "surroundings", "typed"),
    [
        (["launch.py", "bits=4"], {"WORLD_SIZE": "4"}, "python launch.py bits=4 dispatch=4"),
        (["launch.py"], {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "0"}, "python launch.py dispatch=4"),
        (["dqx run", "-m", "seed=0,1"], {"WORLD_SIZE": "2"}, "dqx run -m seed=0,1 dispatch=2"),
        (["launch.py", "dispatch=3"], {"WORLD_SIZE": "4"}, "python launch.py dispatch=3"),
        (["launch.py", "task=[a,b]"], {"ACCELERATE_USE_CPU": "True"}, "python launch.py 'task=[a,b]' model.device=cpu"),
        (["launch.py", "model.device=cuda:1"], {"ACCELERATE_USE_CPU": "True"}, "python launch.py model.device=cuda:1"),
        (["launch.py"], {"ACCELERATE_USE_CPU": "False"}, "python launch.py"),
        (["launch.py"], {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0"}, "python launch.py dispatch=1"),
    ],
)
def test_what_to_type_instead_of_accelerate_launch(argv: list[str], surroundings: dict[str, str], typed: str) -> None:
    told = foreign.refusal(argv, surroundings)
    assert told.splitlines()[1:] == [f"  {typed}"]
    assert "dispatch=2 for two" not in told


def test_one_process_of_several_says_it(tmp_path: Path) -> None:
    """Were the others to end with an error, torchrun would end the one that says it."""
    for rank, code, told in (("0", 2, "cannot run: launch.py starts the processes"), ("1", 0, "")):
        done = launch(tmp_path, WORLD_SIZE="2", LOCAL_RANK=rank)
        assert done.returncode == code
        assert done.stderr.startswith(told)
        assert bool(done.stderr) == bool(told)
    assert not (tmp_path / "run").exists()


def accelerate(tmp_path: Path, *arguments: str, **more: str) -> str:
    """What a real `accelerate launch` says, which must fail, on a machine that `accelerate config` has seen."""
    home = tmp_path / "hub" / "accelerate"
    home.mkdir(parents=True, exist_ok=True)
    settings = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "mixed_precision": "bf16"}
    (home / "default_config.yaml").write_text(yaml.safe_dump(settings | {"num_processes": 3, "use_cpu": False}))
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *arguments, *command(tmp_path)[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment(tmp_path, HF_HOME=str(tmp_path / "hub"), **more),
    )
    assert done.returncode == 1, done.stderr
    assert not (tmp_path / "run").exists()
    return done.stderr


def test_accelerate_launch_is_told_what_to_type(tmp_path: Path) -> None:
    """With --cpu it starts one process, whatever it is told."""
    told = accelerate(tmp_path, "--cpu", "--num_processes", "2")
    assert told.count("cannot run: launch.py starts the processes that share a run itself") == 1
    assert "(with dispatch=2 for two processes: accelerate launch --cpu starts one" in told
    assert f"  python {shlex.join([*command(tmp_path)[1:], 'model.device=cpu'])}\n" in told


@pytest.mark.slow
def test_what_is_told_runs_and_accelerates_own_configuration_does_not_count(tmp_path: Path) -> None:
    """Two processes, as asked for, not the three of the configuration."""
    told = accelerate(tmp_path, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    assert told.count("cannot run: ") == 1
    typed = next(line for line in told.splitlines() if line.startswith("  python launch.py"))
    assert typed.endswith(" dispatch=2")
    done = subprocess.run(
        [sys.executable, *shlex.split(typed)[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment(tmp_path, HF_HOME=str(tmp_path / "hub")),
    )
    assert done.returncode == 0, done.stderr
    found = RunFolder(tmp_path / "run").read()
    assert found.environment["processes"] == 2
    assert {task.n for task in found.quantized.values()} == {3}
    nothing_is_left(tmp_path)


# ---- which GPUs ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_single_run_cannot_be_separate(tmp_path: Path) -> None:
    done = launch(tmp_path, "dispatch=separate", "seed=-1")
    assert done.returncode == 2
    assert "cannot run, 2 problems" in done.stderr
    assert "dispatch=separate gives each run of a sweep a GPU of its own" in done.stderr


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "kind", lambda: "cuda")
    monkeypatch.setattr(accelerator, "count", lambda: 4)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("way", "device", "problem"),
    [
        ("auto", "auto", None),
        ("4", "auto", None),
        ("8", "cpu", None),
        ("5", "auto", "dispatch=5, but 4 GPUs are visible here; give 4 or less, or model.device=cpu"),
        ("2", "cuda:1", "dispatch=2, but model.device=cuda:1 is a single GPU; write model.device=auto"),
        ("0", "auto", "dispatch=0 must be 1 or more processes, or one of auto, shared, separate"),
        ("-2", "cpu", "dispatch=-2 must be 1 or more processes, or one of auto, shared, separate"),
        ("shred", "auto", "dispatch=shred is unknown; did you mean shared?"),
    ],
)
def test_what_cannot_be_dispatched(way: str, device: str, problem: str | None) -> None:
    found = list(dispatch_problems(way, device))
    assert [p[: len(problem or "")] for p in found] == ([problem] if problem else [])


@pytest.mark.usefixtures("four_gpus")
def test_who_gets_which_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(*overrides: str) -> int:
        config = resolve(compose(list(overrides)))
        return process_count(config.dispatch, config.model.device)

    assert count() == count("dispatch=shared") == 4
    assert count("dispatch=2") == 2
    assert count("model.device=cuda:1") == count("model.device=cpu") == 1
    assert separate("auto", "auto", 2, ["method=rtn,gptq"])
    assert separate("separate", "cpu", 2, [])
    assert not separate("shared", "auto", 2, [])
    assert not separate("2", "auto", 2, [])
    assert not separate("auto", "auto", 1, [])  # a search that asks for one run at a time
    assert not separate("auto", "auto", 2, ["dispatch=1,2"])
    assert not separate("auto", "cuda:0", 2, [])
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert not separate("auto", "auto", 2, [])


def test_a_configuration_survives_the_way_to_the_processes() -> None:
    config = resolve(compose(["experiment=quick", "method=duquant", "cache_max_gb=inf"]))
    config.model.path = "/a/${b}"
    assert restored(yaml.safe_load(yaml.safe_dump(asdict(config)))) == config


def test_a_run_in_this_process_is_ended_when_it_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before nothing has moved for so long; and the clock is gone afterwards."""
    idle = iter([0.0, 0.0, 60.0])
    monkeypatch.setattr(heartbeat, "idle", lambda: next(idle))

    def hang() -> None:
        with watched(0.002, tmp_path / "run.log"):
            heartbeat.stage("quantize")
            time.sleep(60)

    with pytest.raises(RunEnded, match=r"nothing moved for 0.002 minutes \(in 'quantize' since ..:..:..\)"):
        hang()
    assert not list(idle)
    assert "test_dispatch.py" in (tmp_path / "run.log").read_text()
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with watched(60, tmp_path / "run.log"):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_state_of_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """What an earlier launch has left in the folders does not count; those that a launch of its own counts do."""
    monkeypatch.setattr(outcomes, "launched", [])
    names = ("finished", "reused", "failed", "refused", "stopped", "waiting", "new")
    folders = [tmp_path / name for name in names]
    for folder in folders[:-1]:
        folder.mkdir()
        for name in ("results.json", "failure.json", "run.log"):
            (folder / name).write_text("{}")
    outcomes.expect(folders)

    def begin(name: str) -> None:
        (tmp_path / name / "failure.json").unlink()
        (tmp_path / name / "results.json").unlink()
        (tmp_path / name / "run.log").write_text("read the data")

    def finish(name: str, *sources: str) -> None:
        begin(name)
        sides = dict(zip(("full_precision", "quantized"), ({"source": source} for source in sources), strict=True))
        (tmp_path / name / "results.json").write_text(json.dumps({"tasks": {"nano_sums": sides}}))

    finish("finished", "reused", "computed")
    finish("reused", "reused", "reused")
    begin("stopped")
    for name in ("failed", "refused"):
        Failure("too hot", refused=name == "refused").write(tmp_path / name)
    for interrupted, stopped in ((False, RunState("failed", "it was killed")), (True, RunState("interrupted"))):
        found = list(outcomes.outcomes(outcomes.launched, interrupted).values())
        assert found == [
            *(RunState("finished"), RunState("reused"), RunState("failed", "too hot"), RunState("refused", "too hot")),
            *(stopped, RunState("not started"), RunState("not started")),
        ]
    print_outcomes(outcomes.outcomes(outcomes.launched))
    told, *rows = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert told == "Runs:    1 finished, 1 reused, 2 failed, 1 refused, 2 not started"
    assert rows[0] == f"Records: {tmp_path}"
    unfinished = [name for name in names if name not in ("finished", "reused")]
    assert [row.split()[0] for row in rows[3:]] == unfinished
    assert rows[3].split(maxsplit=2) == ["failed", "failed", "too hot"]


def test_where_memory_was_short_the_reason_says_what_to_lower() -> None:
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")):
        assert why(error).startswith(f"out of memory ({type(error).__name__}: ")
        assert "likelihood.batch_tokens" in why(error)
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 50)
    assert why(found.value).startswith("out of memory (RuntimeError: ")
    assert why(ValueError("too hot")) == "ValueError: too hot"
