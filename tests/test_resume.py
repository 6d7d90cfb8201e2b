"""A run that is killed, again and again, and started again as it was: the results of an undisturbed one.

Kills are SIGKILL from within, at random events: before or after a block's forward, while a file is written, flushed,
renamed or removed. So they hit every stage, and do not depend on how fast the machine is.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dqx.cache.journal import Journal, Line
from dqx.config import Config, compose, resolve
from dqx.deltas import compare
from dqx.diffusion.engine import Engine
from dqx.diffusion.scoring import Scorer
from dqx.evaluate.results import TaskResult
from dqx.evaluate.sitting import Sitting
from dqx.models.transformer import Block
from dqx.run import run
from dqx.store import Record, RunFolder

SMALL = [
    *("method=gptq", "bits=2", "task=[nano_facts,nano_sums,nano_text]", "task.limit=3", "likelihood.batch_tokens=64"),
    *("calib.samples=2", "calib.length=32", "outliers.samples=1", "fidelity.samples=0", "wandb.mode=disabled"),
    *("task.suite.nano_text.mc_samples=4", "task.suite.nano_facts.mc_samples=4", "task.suite.nano_text.length=32"),
]


def configured(folder: Path, *overrides: str) -> Config:
    return resolve(compose([*SMALL, f"cache_dir={folder / 'cache'}", *overrides]))


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
    append, stream, score, begin = Journal.append, Engine.stream, Scorer.score, Sitting.__init__
    now = [""]

    def note(what: str, evaluation: str, documents: Iterable[Any]) -> None:
        with path.open("a") as f:
            f.write("".join(f"{what} {evaluation} {document}\n" for document in documents))

    def begun(sitting: Sitting, *args: Any) -> None:
        begin(sitting, *args)
        now[0] = sitting.journal.path.name

    def appended(journal: Journal, lines: list[Line]) -> None:
        append(journal, lines)
        note("finished", journal.path.name, [line.document.rpartition("/")[2] for line in lines])

    def streamed(engine: Engine, prompts: Sequence[Any]) -> Any:
        note("computed", now[0], [prompt.document[1] for prompt in prompts])
        return stream(engine, prompts)

    def scored(scorer: Scorer, requests: Sequence[Any], *args: Any, known: Any, **more: Any) -> Any:
        note("computed", now[0], sorted({r.key[1] for i, r in enumerate(requests) if i not in known}))
        return score(scorer, requests, *args, known=known, **more)

    Sitting.__init__ = begun  # type: ignore[method-assign]
    Journal.append = appended  # type: ignore[method-assign]
    Engine.stream = streamed  # type: ignore[method-assign]
    Scorer.score = scored  # type: ignore[method-assign]


def outcome(results: dict[str, TaskResult]) -> dict[str, Any]:
    """Everything but what it cost, to the last bit."""
    cost = ("seconds", "n_forwards", "n_tokens", "n_saved", "tokens", "notes")
    return {name: {k: v for k, v in result.to_dict().items() if k not in cost} for name, result in results.items()}


def events(folder: Path) -> tuple[Record, int]:
    """An undisturbed run, and how many events it has."""

    def counted() -> None:
        total = Counter()  # type: ignore[var-annotated]
        counting(lambda: total.update(n=1))
        run(configured(folder), folder / "run")
        (folder / "events").write_text(str(total["n"]))

    assert in_a_process(counted) == 0
    return RunFolder(folder / "run").read(), int((folder / "events").read_text())


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_gives_the_results_of_an_undisturbed_one(tmp_path: Path, kills: int) -> None:
    expected, total = events(tmp_path / "undisturbed")
    moments = random.Random(kills)
    folder = tmp_path / "disturbed"

    def attempt(lives: int | None) -> None:
        left = [lives]

        def each() -> None:
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        noting(folder / "log")
        counting(each)
        run(configured(folder), folder / "run")

    folder.mkdir()
    for _ in range(kills):
        before = finished(folder)
        assert in_a_process(lambda: attempt(moments.randrange(total // 2))) == -signal.SIGKILL
        assert finished(folder) >= before
    assert in_a_process(lambda: attempt(None)) == 0
    found = RunFolder(folder / "run").read()
    for side in ("full_precision", "quantized"):
        assert outcome(getattr(found, side)) == outcome(getattr(expected, side))
    assert found.deltas == expected.deltas
    done: set[str] = set()
    for line in (folder / "log").read_text().splitlines():
        what, _, document = line.partition(" ")
        assert document not in done  # neither computed nor finished again
        done |= {document} if what == "finished" else set()
    assert len(done) <= 2 * 3 * 3


def test_two_identical_runs_differ_by_nothing_and_the_second_evaluates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache, and computed afresh as well."""
    first = run(configured(tmp_path), tmp_path / "first")
    afresh = run(configured(tmp_path, "reuse=false"), tmp_path / "afresh")
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


def finished(folder: Path) -> int:
    """Documents in journals and results."""
    journals = (p.read_bytes().count(b'"document"') for p in folder.glob("cache/results/*.journal.*"))
    results = (len(json.loads(p.read_text())["content"]["documents"]) for p in folder.glob("cache/results/*.json"))
    return sum(journals) + sum(results)
