"""The five tables of arXiv 2508.14896 cell by cell beside ours, with a verdict, and commands for what is missing.

A verdict is about one number: the published accuracy lies *within* the 95 % interval of ours over documents (Wilson
1927; averages by MOVER), or it *differs*. The interval is for a fresh sample of documents; both sides answered the same
ones, so that `differs` says a lot, and `within` of a small sample little.

Published averages and relative drops are recomputed from the published cells: several that the study prints do not
follow from its own cells. Tables 2 and 4 print no full precision; it is that of tables 1 and 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from dqx.common.files import jsonable
from dqx.common.names import method_label
from dqx.config.schema import choices
from dqx.evaluate.results import TaskResult
from dqx.record.deltas import Z, level, mover
from dqx.record.folder import Record
from dqx.record.settings import RunSettings
from dqx.record.words import points, value
from dqx.report.gather import FULL_PRECISION, Cell, Evaluation, flat, told_by
from dqx.report.tables import MISSING, Entry, Table, changes, with_best

TABLES = Path(__file__).with_name("qdlm_tables.yaml")
NAME = re.compile(r"qdlm_table(\d)(?:_(\w+))?")
WITHIN, DIFFERS = "within", "differs"
NOTES = (
    "Ours, and in brackets the published value: within the 95 % interval of ours over documents, or it differs.",
    "Published averages and drops are recomputed from the published cells; several of the printed ones do not follow.",
)
#: Settings of a run that may differ from the preset's without a word: where things are, and on which device.
ELSEWHERE = ("model.device", "data_root")


@dataclass(frozen=True)
class PublishedCell:
    """One number of a published table; model, method, bits and task as in `conf/`."""

    table: int
    model: str
    method: str
    bits: str
    task: str
    accuracy: float  # percent


@cache
def published_cells() -> tuple[PublishedCell, ...]:
    """Every number printed in the tables, averages left out."""
    data = yaml.safe_load(TABLES.read_text(encoding="utf-8"))
    return tuple(
        PublishedCell(row["table"], row["model"], row["method"], row["bits"], task, value)
        for row in data["rows"]
        for group, tasks in data["columns"].items()
        for task, value in zip(tasks, row.get(group) or [None] * len(tasks), strict=True)
        if value is not None
    )


def presets() -> list[str]:
    """The presets of the published tables, by number."""
    return [name for name in choices("experiment") if NAME.fullmatch(name)]


@dataclass(frozen=True)
class Line:
    """One row of a published table, with what we have of it."""

    model: str
    method: str  # as in `conf/method`, the preset's variant included
    bits: str
    published: dict[str, float]  # by task, fractions
    baseline: dict[str, float]  # full precision of the same tasks
    ours: Cell | None
    unlike: tuple[str, ...] = ()  # the settings in which our runs differ from the preset's

    @property
    def average(self) -> float:
        """Recomputed from the published cells."""
        return fmean(self.published.values())

    @property
    def drop(self) -> float:
        """The published relative drop, recomputed."""
        before = fmean(self.baseline[task] for task in self.published)
        return (before - self.average) / before

    @property
    def results(self) -> dict[str, TaskResult]:
        """Our results for the tasks of the table."""
        full, quantized = ({}, {}) if self.ours is None else self.ours.sides
        side = full if self.method == FULL_PRECISION else quantized
        return {task: side[task] for task in self.published if task in side}

    @property
    def missing(self) -> list[str]:
        """The tasks that no run of ours has."""
        return [task for task in self.published if task not in self.results]


@dataclass(frozen=True)
class Comparison:
    """A preset: one table per model, and the commands that would fill its gaps."""

    preset: str
    tables: list[Table]
    counts: dict[str, int]  # verdict -> cells, averages not counted
    commands: list[tuple[str, list[str]]]  # a command, and the tasks it fills


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % score interval of a share of n documents (Wilson 1927, J. Am. Stat. Assoc. 22:209)."""
    centre, half = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, (centre - half) / (1 + Z**2 / n)), min(1.0, (centre + half) / (1 + Z**2 / n))


def verdict(published: float, ours: Sequence[TaskResult]) -> str:
    """Whether the published average of some tasks lies within the interval of ours. Printed to 0.1 %, so +-0.05 %."""
    limits = mover([(result.value, *wilson(result.value, result.n)) for result in ours])
    assert limits is not None
    low, high = limits
    return WITHIN if low - 0.0005 <= published <= high + 0.0005 else DIFFERS


def present(evaluated: Sequence[Evaluation]) -> list[str]:
    """The presets that our runs have cells of."""
    return [name for name in presets() if any(line.results for line in lines(name, evaluated))]


def lines(preset: str, evaluated: Sequence[Evaluation]) -> list[Line]:
    """The rows of a preset's table, full precision first for every model. Raises ValueError for another preset."""
    match = NAME.fullmatch(preset)
    if match is None or preset not in presets():
        raise ValueError(f"{preset} is no preset of a published table; there are {', '.join(presets())}")
    table, variant = int(match[1]), match[2]
    printed: dict[tuple[str, str, str], dict[str, float]] = {}
    for number in published_cells():
        if number.table == table:
            row = printed.setdefault((number.model, number.method, number.bits), {})
            row[number.task] = number.accuracy / 100
    baselines = {(c.model, c.task): c.accuracy / 100 for c in published_cells() if c.method == FULL_PRECISION}
    wanted: list[Line] = []
    for model in dict.fromkeys(model for model, _, _ in printed):
        rows = {key: tasks for key, tasks in printed.items() if key[0] == model and key[1] != FULL_PRECISION}
        quantized = []
        for (_, method, bits), tasks in rows.items():
            label = method_label(method, variant)
            cell, unlike = _ours(preset, model, label, bits, list(tasks), evaluated)
            baseline = {task: baselines[model, task] for task in tasks}
            quantized.append(Line(model, label, bits, tasks, baseline, cell, unlike))
        best = max(quantized, key=lambda line: (len(line.results), -len(line.unlike)))
        wanted.append(Line(model, FULL_PRECISION, "w16a16", best.baseline, best.baseline, best.ours, best.unlike))
        wanted += quantized
    return wanted


def _ours(
    preset: str, model: str, method: str, bits: str, tasks: list[str], evaluated: Sequence[Evaluation]
) -> tuple[Cell | None, tuple[str, ...]]:
    """Our cell nearest to what the preset would run, and in which settings it differs."""
    candidates: list[tuple[Cell, tuple[str, ...]]] = []
    for cell in (cell for evaluation in evaluated for cell in evaluation.cells):
        record = cell.runs[-1].record
        run = record.settings
        if (run.model, run.method_label, run.bits) == (model, method, bits) and set(tasks) & set(cell.quantized):
            candidates.append((cell, tuple(differences(composed(preset, model, method, bits), record, tasks))))
    return min(candidates, key=lambda pair: (len(pair[1]), -len(pair[0].quantized)), default=(None, ()))


@cache
def composed(preset: str, model: str, method: str, bits: str) -> dict[str, Any]:
    """The configuration of one of a preset's runs, as a record holds it."""
    from dqx.config.compose import compose, resolve  # Hydra, which only runs like a preset's need

    overrides = [f"experiment={preset}", f"model={model}", f"method={method}", f"bits={bits}"]
    config: dict[str, Any] = jsonable(asdict(resolve(compose(overrides))))
    return config


def differences(preset: dict[str, Any], run: Record, tasks: Iterable[str]) -> list[str]:
    """The settings that a score depends on and in which a run is not as the preset: `task.limit=16 (null)`."""
    suites = [RunSettings.of(config).tasks for config in (preset, run.config)]
    both = [task for task in tasks if all(task in suite for suite in suites)]
    sides = []
    for config, suite in zip((preset, run.config), suites, strict=True):
        evaluated, quantized = told_by(config, run.model.get("fingerprint"))
        sides.append(evaluated | quantized | flat({task: suite[task] for task in both}, "task.suite"))
    before, after = sides
    return [
        f"{key}={after.get(key, 'null')} (the preset: {before.get(key, 'null')})"
        for key in dict.fromkeys((*before, *after))
        if before.get(key) != after.get(key) and key not in ELSEWHERE
    ]


def compared(preset: str, evaluated: Sequence[Evaluation]) -> Comparison:
    """A preset's tables, whatever there is of them."""
    rows = lines(preset, evaluated)
    counts = dict.fromkeys((WITHIN, DIFFERS, MISSING), 0)
    tables = []
    for model in dict.fromkeys(line.model for line in rows):
        members = [line for line in rows if line.model == model]
        tasks = list(members[0].published)
        entries = [_entries(line, counts) for line in members]
        columns = ("setting", "method", *tasks, "average", "relative drop, %", "drop")
        notes, rules = (*NOTES, *_unlike(members)), changes([row[0].text for row in entries[1:]])
        title = f"{preset}: {model}"
        rows_of = with_best(entries[1:], dict.fromkeys(range(2, 3 + len(tasks)), False), rules)
        tables.append(Table(title, columns, rows_of, entries[:1], notes, left=2, stacked=True, rules=rules))
    return Comparison(preset, tables, counts, commands(preset, rows))


def _entries(line: Line, counts: dict[str, int]) -> list[Entry]:
    results, whole = line.results, not line.missing
    names = ("full precision", "") if line.method == FULL_PRECISION else (line.bits, line.method)
    entries = [Entry(names[0], code=line.method != FULL_PRECISION), Entry(names[1], code=True)]
    for task, published in line.published.items():
        entry = _beside(published, [results[task]] if task in results else [])
        counts[entry.kind] += 1
        entries.append(entry)
    entries.append(_beside(line.average, list(results.values()) if whole else []))
    if line.method == FULL_PRECISION:
        return [*entries, Entry(), Entry()]
    printed = f"({points(line.drop).removeprefix('+')})", f"({level(line.drop)})"
    if not whole or line.ours is None:
        return [*entries, *(Entry(MISSING, small, None, MISSING) for small in printed)]
    before, after = (fmean(side[task].value for task in line.published) for side in line.ours.sides)
    drop = (before - after) / before if before else math.nan
    own = Entry(level(drop) or "-", printed[1], drop)
    return [*entries, Entry(points(drop).removeprefix("+"), printed[0], drop), own]


def _beside(published: float, ours: Sequence[TaskResult]) -> Entry:
    """Our mean with the published value beside it."""
    printed = f"({value(published, None)})"
    if not ours:
        return Entry(MISSING, printed, None, MISSING)
    mean, judged = fmean(result.value for result in ours), verdict(published, ours)
    return Entry(value(mean, None), f"{printed} {judged}", mean, judged)


def _unlike(rows: Sequence[Line]) -> list[str]:
    """In what our runs are not the preset's, once for all rows of which it holds."""
    rows_of: dict[str, list[str]] = {}
    for line in rows:
        for setting in line.unlike if line.method != FULL_PRECISION else ():
            rows_of.setdefault(setting, []).append(f"{line.method} {line.bits}")
    return [f"Not as the preset, {', '.join(names)}: {setting}." for setting, names in rows_of.items()]


def commands(preset: str, rows: Sequence[Line]) -> list[tuple[str, list[str]]]:
    """One command per row that has gaps, first one for all where there is nothing yet. Full precision comes along."""
    quantized = [line for line in rows if line.method != FULL_PRECISION]
    typed = []
    if not any(line.results for line in quantized):
        typed.append((f"python launch.py experiment={preset}", ["all cells"]))
    for line in quantized:
        if line.missing:
            where = f"model={line.model} method={line.method} bits={line.bits}"
            tasks = f" task={','.join(line.missing)}" if line.results else ""
            typed.append((f"python launch.py experiment={preset} {where}{tasks}", line.missing))
    return typed
