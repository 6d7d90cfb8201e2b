"""Several processes share an evaluation: the same results as one process alone, whoever computes what."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState, debug_launcher
from torch.multiprocessing import ProcessExitedException

from dqx.api import DiffusionLM, load
from dqx.common.processes import one_model, processes, shares
from dqx.config.compose import compose, resolve
from dqx.evaluate.journal import Journal
from dqx.evaluate.results import TaskResult
from dqx.evaluate.session import Document, EvaluationSession
from dqx.evaluate.settings import LikelihoodSettings
from dqx.record.folder import RunFolder
from dqx.study.cache.key import Key
from dqx.study.facts import model_digest
from dqx.study.run import run

TASKS = ("nano_facts", "nano_sums", "nano_text", "nano_code")
KEY = Key("results", "task", {})


@pytest.fixture(scope="module")
def lm() -> DiffusionLM:
    return load("nano_llada")


@pytest.fixture(scope="module")
def alone(lm: DiffusionLM) -> Callable[..., dict[str, Any]]:
    """The result that one process has for a task, computed once."""
    return functools.cache(lambda task, limit=5: evaluated(lm, task, limit=limit))


def launch(n: int, folder: Path, function: Callable[[], Any]) -> list[Any]:
    """What `function` returns in each of `n` processes connected by gloo (forked: nothing is imported again)."""
    folder.mkdir(exist_ok=True)

    def process() -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate shares out the cores, which forked processes cannot use
        PartialState._reset_state()
        found = function()
        (folder / f"rank{processes().rank}.json").write_text(json.dumps(found))

    debug_launcher(process, num_processes=n)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(n)]


def evaluated(lm: DiffusionLM, task: str, journal: Journal | None = None, limit: int = 5) -> dict[str, Any]:
    suite = resolve(compose([f"task={task}"])).task.suite
    settings = LikelihoodSettings(batch_tokens=100)
    return lm.evaluate_suite(suite, limit=limit, journal=journal, likelihood=settings)[task].to_dict()


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal results: predictions, scores and metric to the letter, likelihoods but for rounding."""
    one, other = TaskResult.from_dict(found), TaskResult.from_dict(expected)
    assert one.value == pytest.approx(other.value, rel=1e-5)
    assert [row.doc_id for row in one.documents] == [row.doc_id for row in other.documents]
    for a, b in zip(one.documents, other.documents, strict=True):
        assert (a.prediction, a.answer, a.target) == (b.prediction, b.answer, b.target)
        assert a.score == pytest.approx(b.score, rel=1e-5)
        if b.log_likelihoods is not None:
            assert a.log_likelihoods == pytest.approx(b.log_likelihoods, rel=1e-5)


@pytest.mark.parametrize(("n", "tasks"), [(2, TASKS), pytest.param(3, TASKS[:3], marks=pytest.mark.slow)])
def test_the_results_of_several_processes_are_those_of_one(
    lm: DiffusionLM, alone: Callable[..., dict[str, Any]], tmp_path: Path, n: int, tasks: Sequence[str]
) -> None:
    """A likelihood, a generation, a text and a program task; every process gets the very same result."""
    found = launch(n, tmp_path / "ranks", lambda: [evaluated(lm, task) for task in tasks])
    assert all(other == found[0] for other in found)
    for task, result in zip(tasks, found[0], strict=True):
        expected = alone(task)
        same(result, expected)
        assert result["notes"] == expected["notes"]
        assert (result["tokens"], result["n_saved"]) == (expected["tokens"], expected["n_saved"])
        # a forward that two documents share (all masked) is computed by both processes
        assert expected["n_forwards"] <= result["n_forwards"] <= expected["n_forwards"] + n - 1


def test_more_processes_than_documents(lm: DiffusionLM, alone: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    found = launch(3, tmp_path / "ranks", lambda: [evaluated(lm, task, limit=1) for task in TASKS[:3]])
    for task, result in zip(TASKS, found[2], strict=False):
        same(result, alone(task, limit=1))


@pytest.mark.parametrize("task", ["nano_facts", "nano_sums", pytest.param("nano_text", marks=pytest.mark.slow)])
def test_a_process_that_is_killed_and_a_run_that_goes_on_with_another_number(
    lm: DiffusionLM, alone: Callable[..., dict[str, Any]], tmp_path: Path, task: str
) -> None:
    """The second of two processes dies; one process goes on with what both had finished, then two with all of it."""

    def killed() -> None:
        journal = Journal(tmp_path / "task", KEY.facts, processes().rank)
        append = journal.append

        def die(lines: Any) -> None:
            append(lines)
            if processes().rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        journal.append = die  # type: ignore[method-assign]
        evaluated(lm, task, journal)

    with pytest.raises(ProcessExitedException):
        launch(2, tmp_path / "killed", killed)
    before = Journal(tmp_path / "task", KEY.facts).read().lines
    assert 0 < len(before) < 5
    result = evaluated(lm, task, Journal(tmp_path / "task", KEY.facts))
    expected = alone(task)
    same(result, expected)
    note = f"continued: {len(before)} of 5 documents were finished in earlier sessions"
    assert result["notes"] == [*expected["notes"], note]
    again = launch(
        2, tmp_path / "again", lambda: evaluated(lm, task, Journal(tmp_path / "task", KEY.facts, processes().rank))
    )
    same(again[0], expected)
    assert again[0]["n_forwards"] == result["n_forwards"]  # nothing was computed again
    assert again[0]["seconds"] > result["seconds"] / 2


def test_a_run_of_two_processes_leaves_one_record(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One writes, both know; the second run, of one process, finds everything in the cache."""
    small = ["method=gptq", "bits=3", "task=nano_sums", "task.limit=2", "wandb.mode=disabled"]
    small += ["calib.samples=2", "calib.length=64", "outliers.samples=1", "outliers.steps=2", "fidelity.samples=0"]
    config = resolve(compose([*small, f"cache_dir={tmp_path / 'cache'}"]))

    def both() -> Any:
        record = run(config, tmp_path / "run" / str(processes().rank))
        return [record.sources, {name: result.to_dict() for name, result in record.quantized.items()}]

    (sources, first), (_, second) = launch(2, tmp_path / "ranks", both)
    assert first == second
    assert all(set(side.values()) == {"computed"} for side in sources.values())
    assert capfd.readouterr().out.count("Record:") == 1
    written = RunFolder(tmp_path / "run" / "0").read()
    assert not (tmp_path / "run" / "1").exists()
    assert {name: result.to_dict() for name, result in written.quantized.items()} == first
    again = run(config, tmp_path / "again")
    assert all(set(side.values()) == {"reused"} for side in again.sources.values())
    assert again.deltas == written.deltas


def test_one_model_for_all(lm: DiffusionLM, tmp_path: Path) -> None:
    """Other numbers in another process give way to the main one's; another setting ends the run."""
    digest = model_digest(lm.model)

    def numbers() -> list[Any]:
        if not processes().main:
            lm.model.blocks[0].q.weight.data += 1e-3
        notes = one_model(lm.model, model_digest)
        return [model_digest(lm.model) == digest, notes]

    for equal, notes in launch(2, tmp_path / "ranks", numbers):
        assert equal
        assert len(notes) == 1

    def settings() -> str:
        lm.model.blocks[0].extra = processes().rank
        try:
            one_model(lm.model, model_digest)
        except RuntimeError as error:
            return str(error)
        return ""

    assert all("differently" in message for message in launch(2, tmp_path / "ranks", settings))
    assert one_model(lm.model, model_digest) == []


def test_shares_are_balanced_and_a_pure_function() -> None:
    work = [7, 1, 1, 5, 3, 3]
    assert shares(work, 2) == [[0, 5], [1, 2, 3, 4]]
    assert shares(work, 1) == [list(range(6))]
    assert shares([], 2) == [[], []]
    for n in (2, 3, 7):
        work = torch.randint(1, 100, (50,), generator=torch.Generator().manual_seed(n)).tolist()
        found = shares(work, n)
        assert sorted(i for share in found for i in share) == list(range(50))
        loads = [sum(work[i] for i in share) for share in found]
        assert max(loads) - min(loads) <= min(work[share[-1]] for share in found) + max(work) / 2


def test_a_document_with_another_text_is_not_taken_from_the_journal(tmp_path: Path) -> None:
    documents = [Document("task/0", [0, 1], "text"), Document("task/1", [2], "text")]
    session = EvaluationSession(documents, [1, 1, 1], Journal(tmp_path / "task", KEY.facts))
    session.enter({0: "a"})
    assert not list(tmp_path.iterdir())  # not complete
    session.enter({2: "c", 1: "b"})
    assert session.gather() == ["a", "b", "c"]
    changed = [Document("task/0", [0, 1], "another text"), documents[1]]
    again = EvaluationSession(changed, [1, 1, 1], Journal(tmp_path / "task", KEY.facts))
    assert again.known == {2: "c"}
    assert again.todo == [0, 1]
