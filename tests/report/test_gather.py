"""Runs sorted into tables: what makes a cell, means over seeds, what is told apart, and what is in no table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import records

from dqx.evaluate.results import TaskResult
from dqx.record.collection import Run, runs
from dqx.record.compare import differences
from dqx.record.deltas import paired_interval
from dqx.record.folder import Record, RunFolder
from dqx.record.outcomes import Failure
from dqx.report import content, tables
from dqx.report.gather import Evaluation, RunGroup, evaluations, groups, mean_over_seeds
from dqx.report.markdown import markdown

BASE = records.record(outliers={}, fidelity={})


def run(seed=0, scores=(1, 1, 1, 1), method="gptq", bits="w3a16", task="nano_sums", **more) -> Record:
    config = BASE.config | {"seed": seed, "method": {"name": method}, "bits": {"name": bits}} | more.pop("config", {})
    created = more.pop("created", "2026-01-01T00:00:00+00:00")
    full_precision, quantized = (
        {task: records.task_result(task, list(values), **more)} for values in ([1] * len(scores), scores)
    )
    return replace(BASE, config=config, full_precision=full_precision, quantized=quantized, created=created, deltas=[])


def sorted_out(*read: Record) -> list[Evaluation]:
    return evaluations([Run(Path(str(i)), record) for i, record in enumerate(read)])


def only(evaluated: list[Evaluation]) -> RunGroup:
    (group,) = groups(evaluated)
    return group


def test_seeds_of_one_setting_make_one_cell() -> None:
    group = only(sorted_out(run(0, [1, 1, 0, 0]), run(1, [1, 0, 0, 0]), run(0, [1, 1, 1, 1], bits="w4a16")))
    assert [(row.cell.bits, row.cell.seeds) for row in group.rows] == [("w4a16", (0,)), ("w3a16", (0, 1))]
    row = group.rows[1]
    assert row.overall.quantized == pytest.approx(3 / 8)
    limits = paired_interval([0, -0.5, -1, -1])  # four documents, not eight
    assert (row.overall.low, row.overall.high) == pytest.approx(limits)
    assert row.spread == (0.25, 0.5)


def test_seeds_that_did_not_finish_all_tasks_have_no_average_of_their_own() -> None:
    def code(seed: int) -> Record:
        return run(seed, [1, 0, 1, 1], task="nano_code", category="code")

    group = only(sorted_out(run(0, [1, 1, 0, 0]), code(0), run(1, [1, 0, 0, 0])))
    assert group.rows[0].spread == (0.625, 0.625)
    group = only(sorted_out(code(0), run(1, [1, 0, 0, 0])))
    assert group.rows[0].spread is None
    assert tables.study(group).rows[0][-1].text == "2: -"


def test_the_later_of_two_equal_runs_counts() -> None:
    again = run(0, [1, 1, 1, 1], created="2026-01-02T00:00:00+00:00")
    assert only(sorted_out(run(0, [0, 0, 0, 0]), again)).rows[0].overall.quantized == 1


def test_runs_with_different_tasks_share_a_row() -> None:
    """A run that fills a gap later belongs to the row of the first; the average counts the tasks that are there."""
    more = run(0, [1, 0, 1, 1], task="nano_code", category="code")
    group = only(sorted_out(run(0, [1, 1, 0, 0]), more, run(0, [0, 0, 0, 0], method="rtn")))
    table = tables.study(group)
    shown = {row[1].text: [entry.text for entry in row] for row in table.rows}
    at = {name: i for i, name in enumerate(table.columns)}
    assert [shown["gptq"][at[name]] for name in ("nano_sums", "nano_code", "average")] == ["50.0", "75.0", "62.5"]
    assert [shown["rtn"][at[name]] for name in ("nano_sums", "nano_code", "average")] == ["0.0", "missing", "0.0"]
    (short,) = [row[at["average"]].small for row in table.rows if row[1].text == "rtn"]
    assert short == "1 of 2 tasks"


def test_what_differs_in_more_than_the_seed_is_told_apart() -> None:
    """Neither of two step counts hides the other, nor two calibrations, nor two settings of a task."""
    base = run()
    steps = run(config={"steps": {"count": 64}})
    longer = run(config={"calib": BASE.config["calib"] | {"length": 64}})
    evaluated = sorted_out(base, steps, longer)
    assert [evaluation.name for evaluation in evaluated] == ["nano_llada", "nano_llada, 64 steps"]
    assert [cell.method for cell in evaluated[0].cells] == ["gptq, calib.length=256", "gptq, calib.length=64"]
    other = replace(base, model=base.model | {"fingerprint": "fedc"})
    assert [evaluation.name for evaluation in sorted_out(base, other)] == [
        "nano_llada, checkpoint=0123456789abcdef",
        "nano_llada, checkpoint=fedc",
    ]
    suites = [{"task": {"limit": None, "suite": {"nano_sums": {"fewshot": n}}}} for n in (1, 2)]
    assert [evaluation.name for evaluation in sorted_out(*(run(config=suite) for suite in suites))] == [
        "nano_llada, task.suite.nano_sums.fewshot=1",
        "nano_llada, task.suite.nano_sums.fewshot=2",
    ]


def test_where_things_are_does_not_tell_runs_apart() -> None:
    other = run(1, config={"cache_dir": "elsewhere", "outliers": {"samples": 0}, "wandb": {"mode": "disabled"}})
    assert len(only(sorted_out(run(), other)).rows) == 1


def test_where_a_class_lies_does_not_tell_runs_apart() -> None:
    """Modules have moved since earlier records were written."""
    model = BASE.config["model"]
    paths = ("dqx.diffusion.llada.LLaDASampler", "dqx.diffusion.samplers.llada.LLaDASampler")
    before, after = (run(i, config={"model": model | {"sampler": {"_target_": p}}}) for i, p in enumerate(paths))
    assert len(only(sorted_out(before, after)).rows) == 1
    assert list(differences(before.config, after.config | {"seed": 0})) == []


def test_the_studys_two_kinds_of_tasks_and_texts_have_tables_of_their_own() -> None:
    kinds = {"piqa": "general", "mmlu": "general", "gsm8k": "math", "mbpp": "code"}
    side = {name: records.task_result(name, [1, 0], category) for name, category in kinds.items()}
    text = TaskResult("wikitext2", "text", "nll", 2.0, 2, side["piqa"].documents)
    both = {"full_precision": side | {"wikitext2": text}, "quantized": side | {"wikitext2": text}}
    shown = groups(sorted_out(replace(BASE, **both, deltas=[])))
    assert [(group.kind, group.tasks) for group in shown] == [
        ("general tasks", ("piqa", "mmlu")),
        ("math and code", ("gsm8k", "mbpp")),
        ("texts", ("wikitext2",)),
    ]


def test_full_precision_is_a_row_of_its_own_and_no_cell() -> None:
    group = only(sorted_out(run(method="fp16", bits="w16a16")))
    assert group.rows == []
    assert tables.study(group).head[0][3].text == "100.0"


def test_seeds_with_other_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="different documents"):
        mean_over_seeds([records.task_result("a", [1, 0]), records.task_result("a", [1])])


def test_what_is_no_finished_run_is_named_with_its_reason(tmp_path: Path) -> None:
    RunFolder(tmp_path / "sweep" / "good").write(run())
    RunFolder(tmp_path / "sweep" / "killed").start({"seed": 0}, {})
    Failure("out of memory").write(tmp_path / "sweep" / "failed")
    for name, text in (("cut", '{"schema_version": '), ("old", json.dumps({"schema_version": 99}))):
        RunFolder(tmp_path / name).start({}, {})
        (tmp_path / name / "results.json").write_text(text)
    read = runs(tmp_path, tmp_path / "sweep")
    assert [each.path.name for each in read] == ["good"]  # once, although named twice
    reasons = {each.path.name: each.reason for each in read.skipped}
    assert reasons["failed"] == "out of memory"
    assert reasons["killed"] == "it has not finished: it runs, or was killed"
    assert reasons["cut"].startswith("cannot be read: JSONDecodeError")
    assert "schema version 99" in reasons["old"]
    text = markdown(content.build([tmp_path]))
    assert all(reason.split(":")[0] in text for reason in reasons.values())
    with pytest.raises(ValueError, match=r"no finished run below .*killed\n.*killed: it has not finished"):
        content.build([tmp_path / "sweep" / "killed"])
    with pytest.raises(FileNotFoundError, match="nowhere is no folder of runs"):
        runs(tmp_path / "nowhere")


def test_tables_in_markdown(tmp_path: Path) -> None:
    for i, record in enumerate([run(0, [1, 1, 0, 0]), run(1, [1, 0, 0, 0]), run(0, [1, 1, 1, 1], "rtn", "w8a8")]):
        RunFolder(tmp_path / str(i)).write(record)
    text = markdown(content.build([tmp_path]))
    assert "| method | w8a8 | w3a16 |" in text
    assert "| `gptq` |  | 37.5 (-62.5) |" in text
    assert "| `w3a16` | `gptq` | 3.15 | 37.5 | -62.5 [-" in text
    assert "| 2: 25.0, 50.0 |" in text
