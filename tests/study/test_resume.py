"""A run that is killed, again and again, and started again as it was: the results of an undisturbed one.

Kills are SIGKILL from within, at random events: before or after a block's forward, while a file is written, flushed,
renamed or removed. So they hit every stage, and do not depend on how fast the machine is. One sweep, typed as users
type it, is killed from outside, by the clock.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dqx.config.compose import compose, resolve
from dqx.config.schema import CONF_DIR, Config
from dqx.diffusion.engine import Engine
from dqx.diffusion.scorer import Scorer
from dqx.evaluate.journal import Journal, Line
from dqx.evaluate.results import TaskResult
from dqx.evaluate.session import EvaluationSession
from dqx.models.transformer import Block
from dqx.record.deltas import compare
from dqx.record.folder import RunFolder
from dqx.study.run import run

SMALL = [
    *("method=gptq", "bits=2", "task.limit=3", "likelihood.batch_tokens=64", "wandb.mode=disabled"),
    *("calib.samples=2", "calib.length=32", "outliers.samples=1", "fidelity.samples=0"),
]
TASKS = [
    *("task=[nano_facts,nano_sums,nano_text]", "task.suite.nano_facts.mc_samples=4"),
    *("task.suite.nano_text.mc_samples=4", "task.suite.nano_text.length=32"),
]


def configured(folder: Path, *overrides: str) -> Config:
    return resolve(compose([*SMALL, f"cache_dir={folder / 'cache'}", *(overrides or TASKS)]))


def in_a_process(function: Callable[[], Any]) -> int | None:
    """The exit code of a forked process that calls `function`."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join()
    return process.exitcode


def counting(each: Callable[[], None]) -> None:
    """Call `each` at every event, in this process from now on."""

    def around(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            each()
            found = original(*args, **kwargs)
            each()
            return found

        setattr(owner, name, counted)

    for owner, name in ((Block, "forward"), (os, "fsync"), (os, "replace"), (Journal, "append"), (Path, "unlink")):
        around(owner, name)


def noting(path: Path) -> None:
    """Note, in this process from now on, by evaluation which documents are computed and which are finished."""
    append, stream, score, begin = Journal.append, Engine.stream, Scorer.score, EvaluationSession.__init__
    now = [""]

    def note(what: str, evaluation: str, documents: Iterable[Any]) -> None:
        with path.open("a") as f:
            f.write("".join(f"{what} {evaluation} {document}\n" for document in documents))

    def begun(session: EvaluationSession, *args: Any) -> None:
        begin(session, *args)
        now[0] = session.journal.path.name

    def appended(journal: Journal, lines: list[Line]) -> None:
        append(journal, lines)
        note("finished", journal.path.name, [line.document.rpartition("/")[2] for line in lines])

    def streamed(engine: Engine, prompts: Sequence[Any]) -> Any:
        note("computed", now[0], [prompt.document[1] for prompt in prompts])
        return stream(engine, prompts)

    def scored(scorer: Scorer, requests: Sequence[Any], *args: Any, known: Any, **more: Any) -> Any:
        note("computed", now[0], sorted({r.key[1] for i, r in enumerate(requests) if i not in known}))
        return score(scorer, requests, *args, known=known, **more)

    EvaluationSession.__init__ = begun  # type: ignore[method-assign]
    Journal.append = appended  # type: ignore[method-assign]
    Engine.stream = streamed  # type: ignore[method-assign]
    Scorer.score = scored  # type: ignore[method-assign]


def outcome(results: dict[str, TaskResult]) -> dict[str, Any]:
    """Everything but what it cost, to the last bit."""
    cost = ("seconds", "n_forwards", "n_tokens", "n_saved", "tokens", "notes")
    return {name: {k: v for k, v in result.to_dict().items() if k not in cost} for name, result in results.items()}


def events(config: Config, folder: Path) -> int:
    """How many events an undisturbed run has, which leaves its record in `folder`."""
    count = folder.with_suffix(".events")

    def counted() -> None:
        total = [0]

        def each() -> None:
            total[0] += 1

        counting(each)
        run(config, folder)
        count.write_text(str(total[0]))

    assert in_a_process(counted) == 0
    return int(count.read_text())


def killed(config: Config, folder: Path, after: int) -> bool:
    """Run in a process that is killed after so many events; False: it came to its end before."""
    left = [after]

    def each() -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def doomed() -> None:
        noting(folder.with_suffix(".log"))
        counting(each)
        run(config, folder)

    code = in_a_process(doomed)
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_gives_the_results_of_an_undisturbed_one(tmp_path: Path, kills: int) -> None:
    total = events(configured(tmp_path / "undisturbed"), tmp_path / "undisturbed" / "run")
    expected = RunFolder(tmp_path / "undisturbed" / "run").read()
    moments = random.Random(kills)
    for folder in (tmp_path / f"disturbed{n}" for n in itertools.count()):
        config = configured(folder)
        while kills:
            before = finished(folder)
            if not killed(config, folder / "run", moments.randrange(total // 2)):
                break
            assert finished(folder) >= before
            kills -= 1
        else:
            run(config, folder / "run")
        found = RunFolder(folder / "run").read()
        for side in ("full_precision", "quantized"):
            assert outcome(getattr(found, side)) == outcome(getattr(expected, side))
        assert found.deltas == expected.deltas
        done: set[str] = set()
        log = folder / "run.log"  # of the runs that were killed: none where each ended before its first document
        for line in log.read_text().splitlines() if log.exists() else ():
            what, _, document = line.partition(" ")
            assert document not in done  # neither computed nor finished again
            done |= {document} if what == "finished" else set()
        if not kills:
            return


def test_a_run_killed_while_it_writes_its_record_leaves_whole_files(tmp_path: Path) -> None:
    """At every second of the last events: what is there can be read, and results.json stands for all of it."""
    config = configured(tmp_path, "method=rtn", "task=nano_facts", "outliers.samples=0")
    run(config, tmp_path / "first")
    total = events(config, tmp_path / "run")
    for after in range(total - 9, total, 2):
        folder = tmp_path / f"run{after}"
        assert killed(config, folder, after)
        for path in folder.glob("[!.]*.json"):
            json.loads(path.read_text())
        if (folder / "results.json").exists():
            assert RunFolder(folder).read().sources["quantized"] == {"nano_facts": "reused"}


def test_two_identical_runs_differ_by_nothing_and_the_second_evaluates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache, and computed afresh as well."""
    first = run(configured(tmp_path), tmp_path / "first")
    afresh = run(configured(tmp_path, *TASKS, "reuse=false"), tmp_path / "afresh")
    for name in ("score", "stream"):
        monkeypatch.setattr(Scorer if name == "score" else Engine, name, None)
    second = run(configured(tmp_path), tmp_path / "second")
    assert [{*sides["quantized"].values()} for sides in (first.sources, afresh.sources, second.sources)] == [
        {"computed"},
        {"computed"},
        {"reused"},
    ]
    for other in (afresh, second):
        for side in ("full_precision", "quantized"):
            before, after = getattr(first, side), getattr(other, side)
            assert outcome(before) == outcome(after)
            assert all((row.delta, row.lost, row.gained) == (0, 0, 0) for row in compare(before, after))


def logging_to(path: Path) -> None:
    """Append what runs say to a file, in this process from now on."""
    handler = logging.FileHandler(path)
    logging.getLogger("dqx").addHandler(handler)
    logging.getLogger("dqx").setLevel(logging.DEBUG)  # what the cache has is said with verbose=2


def assert_nothing_finished_is_computed(log: str) -> None:
    """By what runs said one after another: no artefact again, no model quantized but for the first time."""
    done: set[str] = set()
    for line in log.splitlines():
        what, _, artefact = line.strip().partition(" ")
        assert what != "computing" or artefact.strip() not in done
        done |= {artefact.strip()} if what == "computed" else set()
    assert log.count("  quantizing\n") <= log.count("computing quantized/")  # a kill may fall between them


def sweep(folder: Path, methods: Sequence[str], widths: Sequence[str], steps: Sequence[int]) -> list[Config]:
    """The configurations of a multirun over methods, widths and steps."""
    tiny = ["task=nano_sums", "task.limit=1", "fidelity.samples=1", "fidelity.gen_length=2"]
    return [
        configured(folder, *tiny, f"method={method}", f"bits={bits}", f"steps={count}")
        for method, bits, count in itertools.product(methods, widths, steps)
    ]


@pytest.mark.parametrize(
    ("methods", "widths", "kills"),
    [
        (("gptq", "smoothquant"), ("w2a16",), 2),
        pytest.param(("gptq", "smoothquant", "awq"), ("w2a16", "w3a16", "w4a16", "w8a16"), 10, marks=pytest.mark.slow),
    ],
)
def test_a_sweep_killed_again_and_again_computes_every_stage_once(
    tmp_path: Path, methods: Sequence[str], widths: Sequence[str], kills: int
) -> None:
    """2 and 12 quantized models, two numbers of steps each; SIGKILL at random events, then the whole sweep again."""
    total, log = tmp_path / "events", tmp_path / "log"

    def undisturbed() -> None:
        count = [0]

        def each() -> None:
            count[0] += 1

        counting(each)
        for i, config in enumerate(sweep(tmp_path / "undisturbed", methods, widths, (8, 16))):
            run(config, tmp_path / "undisturbed" / str(i))
        total.write_text(str(count[0]))

    assert in_a_process(undisturbed) == 0
    configs = sweep(tmp_path / "disturbed", methods, widths, (8, 16))
    moments = random.Random(kills)

    def attempt(left: list[int]) -> None:
        def each() -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        logging_to(log)
        counting(each)
        for i, config in enumerate(configs):
            run(config, tmp_path / "disturbed" / str(i))

    for _ in range(kills):
        left = [moments.randrange(int(total.read_text()) // (kills + 1))]
        assert in_a_process(lambda left=left: attempt(left)) == -signal.SIGKILL
    assert in_a_process(lambda: attempt([10**9])) == 0
    assert_nothing_finished_is_computed(log.read_text())
    assert log.read_text().count("computed  quantized/") == len(configs) // 2
    for i in range(len(configs)):
        expected, found = (RunFolder(tmp_path / folder / str(i)).read() for folder in ("undisturbed", "disturbed"))
        for side in ("full_precision", "quantized"):
            assert outcome(getattr(found, side)) == outcome(getattr(expected, side))
        assert (found.deltas, found.outliers, found.fidelity) == (expected.deltas, expected.outliers, expected.fidelity)


COMMAND = [
    *("launch.py", "-m", "method=gptq,awq,smoothquant", "bits=w2a16,w3a16,w4a16,w8a16", "steps=8,16", "task=nano_sums"),
    *("task.limit=1", "calib.samples=2", "calib.length=32", "outliers.samples=1", "fidelity.samples=1"),
    *("fidelity.length=32", "fidelity.gen_length=2", "wandb.mode=disabled", "verbose=2"),
]


def typed(folder: Path) -> subprocess.Popen[str]:
    """The sweep of `COMMAND`, its runs and its cache where they are by default; what it says is added to two files."""
    folder.mkdir(exist_ok=True)
    launch = [sys.executable, str(CONF_DIR.parent / "launch.py"), *COMMAND[1:]]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(CONF_DIR.parent)}
    with (folder / "stdout").open("a") as out, (folder / "log").open("a") as log:
        return subprocess.Popen(
            launch, cwd=folder, env=quiet, stdout=out, stderr=log, text=True, start_new_session=True
        )


def killed_after(folder: Path, pause: float) -> bool:
    """Type the sweep and kill its process group so many seconds after it has begun with something new.

    False: it came to its end before.
    """
    already = len((folder / "log").read_text()) if folder.exists() else 0
    sweep = typed(folder)
    while sweep.poll() is None and "  computing " not in (folder / "log").read_text()[already:]:
        time.sleep(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):
        assert sweep.wait(pause) == 0, (folder / "log").read_text()[already:]
        return False
    os.killpg(sweep.pid, signal.SIGKILL)
    return sweep.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_the_command_itself_killed_by_the_clock_and_typed_again(tmp_path: Path) -> None:
    """24 runs; ten times the process group gets SIGKILL, at moments spread over the time that all of it takes.

    Where the machine has become faster, the sweep comes to its end before; then it begins anew with another cache, and
    the kills that are left come sooner.
    """
    undisturbed, moments = tmp_path / "undisturbed", random.Random(24)
    started = time.monotonic()
    assert not killed_after(undisturbed, 3600)
    needed = time.monotonic() - started
    cuts = sorted(moments.uniform(0, needed) for _ in range(10))
    pauses = [cut - before for before, cut in zip([0.0, *cuts], cuts, strict=False)]
    moments.shuffle(pauses)
    for folder in (tmp_path / f"disturbed{n}" for n in itertools.count()):
        while pauses and killed_after(folder, pauses[-1]):
            pauses.pop()
        assert pauses or typed(folder).wait() == 0
        log = (folder / "log").read_text()
        assert_nothing_finished_is_computed(log)
        assert log.count("computed  quantized/") <= 12  # where a kill fell between writing and saying so, less
        assert_equal_sweeps(undisturbed, folder)
        if not pauses:
            return
        pauses = [pause / 2 for pause in pauses]


def assert_equal_sweeps(undisturbed: Path, disturbed: Path) -> None:
    """Records and the table at the end are the same, to the last bit."""
    before, after = (
        [RunFolder(path.parent).read() for path in numbered(sorted(folder.glob("runs/*/*-sweep"))[-1])]
        for folder in (undisturbed, disturbed)
    )
    assert len(before) == len(after) == 24
    for expected, found in zip(before, after, strict=True):
        for side in ("full_precision", "quantized"):
            assert outcome(getattr(found, side)) == outcome(getattr(expected, side))
        assert (found.deltas, found.outliers, found.fidelity) == (expected.deltas, expected.outliers, expected.fidelity)
        assert found.config == expected.config
    tables = [table((folder / "stdout").read_text()) for folder in (undisturbed, disturbed)]
    assert tables[0] == tables[1]


def table(printed: str) -> str:
    """The last table of what sweeps printed, without what became of their runs."""
    return printed.rpartition("bits per")[2].partition("In percent")[0]


def numbered(sweep: Path) -> list[Path]:
    """The results of a sweep's runs in their order."""
    return sorted(sweep.glob("*/results.json"), key=lambda path: int(path.parent.name.partition("-")[0]))


@pytest.mark.parametrize("runs", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_simultaneous_runs_compute_each_artefact_once(tmp_path: Path, runs: int) -> None:
    """All start together, and leave the same record."""
    (config,) = sweep(tmp_path, ("gptq",), ("w2a16",), (8,))
    context = multiprocessing.get_context("fork")
    together = context.Barrier(runs)

    def start(i: int) -> None:
        logging_to(tmp_path / f"{i}.log")
        together.wait()
        run(config, tmp_path / str(i))

    started = [context.Process(target=start, args=(i,)) for i in range(runs)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * runs
    lines = [line for i in range(runs) for line in (tmp_path / f"{i}.log").read_text().splitlines()]
    computing = sorted(line for line in lines if line.startswith("  computing"))
    assert len(computing) == len(set(computing)) == 8  # of two models outliers, predictions, a task; states; the second
    assert sum(line.startswith("  reused") for line in lines) == 8 * (runs - 1)
    records = [RunFolder(tmp_path / str(i)).read() for i in range(runs)]
    assert all(
        (record.quantized, record.outliers, record.fidelity, record.warnings)
        == (records[0].quantized, records[0].outliers, records[0].fidelity, records[0].warnings)
        for record in records
    )


def finished(folder: Path) -> int:
    """Documents in journals and results."""
    journals = (p.read_bytes().count(b'"document"') for p in folder.glob("cache/results/*.journal.*"))
    results = (len(json.loads(p.read_text())["content"]["documents"]) for p in folder.glob("cache/results/*.json"))
    return sum(journals) + sum(results)
