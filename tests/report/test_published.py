"""The published tables beside ours: recomputed averages, verdicts, and commands that fill exactly what is missing."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import records
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from dqx.common.files import jsonable
from dqx.common.names import method_label
from dqx.config.command_line import normalize
from dqx.config.compose import compose, resolve
from dqx.record.collection import Run
from dqx.record.folder import Record
from dqx.report import content, latex, markdown
from dqx.report.gather import evaluations
from dqx.report.published import DIFFERS, WITHIN, compared, lines, presets, published_cells, verdict, wilson
from dqx.report.tables import MISSING

BASE = records.record(outliers={}, fidelity={})
TABLES = [f"qdlm_table{number}" for number in range(1, 6)]


@cache
def as_recorded(overrides: tuple[str, ...]) -> dict[str, Any]:
    return jsonable(asdict(resolve(compose(overrides))))


def measured(*overrides: str, tasks: list[str], share: float = 0.6, n: int = 10) -> Record:
    """A record as the run of a preset leaves it, with made-up scores."""
    config = as_recorded(overrides)
    scores = [1] * round(share * n) + [0] * (n - round(share * n))
    side = {task: records.task_result(task, scores, "general") for task in tasks}
    model = {"name": config["model"]["name"], "fingerprint": "abc"}
    return replace(BASE, config=config, model=model, full_precision=side, quantized=side, deltas=[])


def ours(*read: Record) -> list:
    return evaluations([Run(Path(str(i)), record) for i, record in enumerate(read)])


def test_averages_and_drops_are_recomputed() -> None:
    """By hand from the printed cells; where a table lacks full precision, from the one that has it."""
    of = {(line.model, line.method, line.bits): line for line in lines("qdlm_table1", [])}
    assert of["llada_8b_base", "fp16", "w16a16"].average == pytest.approx(0.664)  # 398.4 / 6
    gptq = of["llada_8b_base", "gptq", "w4a16"]
    assert gptq.average == pytest.approx(3.991 / 6)
    assert gptq.drop == pytest.approx((3.984 - 3.991) / 3.984)
    of = {(line.model, line.method, line.bits): line for line in lines("qdlm_table2", [])}
    worst = of["llada_8b_base", "smoothquant", "w4a4"]
    assert worst.average == pytest.approx(2.054 / 5)
    assert worst.drop == pytest.approx((3.277 - 2.054) / 3.277)  # HellaSwag is not in this table


def test_verdicts() -> None:
    assert wilson(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert wilson(1.0, 10)[1] == 1.0
    task = records.task_result("a", [1, 0] * 50)
    assert [verdict(x, [task]) for x in (0.40, 0.41, 0.59, 0.60)] == [DIFFERS, WITHIN, WITHIN, DIFFERS]
    narrower = [task] * 4  # an average of four tasks is known twice as well
    assert [verdict(x, narrower) for x in (0.44, 0.46)] == [DIFFERS, WITHIN]
    assert verdict(0.59617 + 0.0004, [task]) == WITHIN  # printed with one digit


@pytest.mark.parametrize("table", TABLES)
def test_every_preset_renders_without_a_single_run(table: str) -> None:
    report = content.of_runs([], presets=[table, f"{table}_as_published"])
    for comparison in report.comparisons:
        rows = lines(comparison.preset, [])
        assert comparison.counts == {WITHIN: 0, DIFFERS: 0, MISSING: sum(len(line.published) for line in rows)}
        assert comparison.commands[0] == (f"python launch.py experiment={comparison.preset}", ["all cells"])
        assert len(comparison.commands) == 1 + sum(line.method != "fp16" for line in rows)
    text = markdown.markdown(report)
    assert text.count(f"### {table}") == 2 * len(
        {c.model for c in published_cells() if f"qdlm_table{c.table}" == table}
    )
    assert latex.latex(report).count(r"\bottomrule") == text.count(f"### {table}")


def test_ours_stand_beside_the_published_ones() -> None:
    run = ["experiment=qdlm_table5", "model=dream_7b_base", "method=gptq", "bits=w4a16"]
    comparison = compared(
        "qdlm_table5", ours(measured(*run, tasks=["winogrande", "piqa", "arc_challenge", "arc_easy"]))
    )
    (table,) = comparison.tables
    row = table.rows[0]
    assert [(entry.text, entry.small) for entry in row[2:]] == [
        ("60.0", "(68.2) within"),
        ("60.0", "(73.9) within"),
        ("60.0", "(58.1) within"),
        ("60.0", "(82.1) within"),
        ("60.0", "(70.6) within"),
        ("0.0", "(0.9)"),
        ("< 1 %", "(< 1 %)"),
    ]
    assert comparison.counts == {WITHIN: 8, DIFFERS: 0, MISSING: 12}  # full precision came along
    assert "Not as the preset" not in "".join(table.notes)
    many = measured(*run, tasks=["winogrande"], n=1000)
    assert compared("qdlm_table5", ours(many)).tables[0].rows[0][2].small == "(68.2) differs"
    assert content.of_runs([Run(Path(), many)]).comparisons[0].preset == "qdlm_table5"  # without being asked for


def test_a_run_that_is_not_quite_the_presets_says_so() -> None:
    run = ["experiment=qdlm_table1", "model=llada_8b_base", "method=gptq", "bits=w4a16"]
    part, whole = (measured(*run, *more, tasks=["mmlu"]) for more in (["task.limit=10"], []))
    notes = " ".join(compared("qdlm_table1", ours(part)).tables[0].notes)
    assert "Not as the preset, gptq w4a16: task.limit=10 (the preset: null)." in notes
    assert "Not as" not in " ".join(compared("qdlm_table1", ours(part, whole)).tables[0].notes)  # the nearer one counts


@pytest.mark.parametrize("table", ["qdlm_table2", "qdlm_table5_as_published"])
def test_a_command_fills_exactly_what_is_missing(table: str) -> None:
    """Expanded by Hydra's own sweeper it is one run, of the row's model, method and width and the missing tasks."""
    first = next(line for line in lines(table, []) if line.method != "fp16")
    where = [f"experiment={table}", f"model={first.model}", f"method={first.method}", f"bits={first.bits}"]
    there = list(first.published)[:1]
    known = measured(*where, tasks=there)
    command, fills = compared(table, ours(known)).commands[0]
    assert fills == list(first.published)[1:]
    program, script, *typed = shlex.split(command)
    assert (program, script) == ("python", "launch.py")
    hydra = normalize(typed)
    preset = compose([f"experiment={table}"])
    (batch,) = BasicSweeper.split_arguments(
        OverridesParser.create().parse_overrides([*(f"{k}={v}" for k, v in preset.sweep.items()), *hydra]), None
    )
    assert len(batch) == 1
    config = resolve(compose(batch[0]))
    method = method_label(config.method.name, config.method.variant)
    assert (config.model.name, method, config.bits.name) == (first.model, first.method, first.bits)
    assert list(config.task.suite) == fills
    row = next(line for line in lines(table, ours(known, measured(*typed, tasks=fills))) if line.method != "fp16")
    assert (row.missing, row.unlike) == ([], ())


def test_other_presets_are_refused() -> None:
    assert presets() == [name for table in TABLES for name in (table, f"{table}_as_published")]
    with pytest.raises(ValueError, match="qdlm_table9 is no preset of a published table; there are qdlm_table1, "):
        lines("qdlm_table9", [])
