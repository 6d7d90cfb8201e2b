"""Finished runs below any folders, sorted into what one table can hold.

Runs that were evaluated in the same way (model, sampler, steps, documents) stand together: one full-precision row is
that of all. Among them, runs that were quantized in the same way (method, bits, calibration) make a *cell*, whatever
their seeds and tasks. The document is the unit of chance: each document's score is averaged over the seeds first, then
documents are paired with full precision (`dqx/record/deltas.py`), so more seeds make the calibration's luck smaller but
never claim more documents than there are. Of two runs alike in everything the later one counts.

What has one name and differs in a setting carries the setting in its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

from dqx.common.names import natural
from dqx.config.schema import PLACES
from dqx.evaluate.results import TaskResult
from dqx.evaluate.spec import NLL
from dqx.record import words
from dqx.record.collection import Run
from dqx.record.deltas import Delta, compare, headline, judged
from dqx.record.folder import SIDES, Record
from dqx.record.settings import RunSettings

#: Settings on which no score depends, or only by the seed's luck; where the checkpoint lies; the tasks, which are told
#: apart one by one; what only other settings read, which have the value.
UNTOLD = (
    *(f"{name}." for name in (*PLACES, "seed", "outliers", "fidelity", "model.path", "task.suite")),
    *(f"{group}.calib_{key}." for group in ("model", "method") for key in ("text", "samples", "length")),
)
#: Settings that say how a model was quantized; all others say how it was evaluated.
QUANTIZATION = ("method", "bits", "calib")
#: The method that leaves a model as it is.
FULL_PRECISION = "fp16"


@dataclass(frozen=True)
class Cell:
    """One way to quantize a model: the runs behind it, and both sides' results, their scores means over the seeds."""

    method: str
    bits: str
    average_bits: float
    runs: tuple[Run, ...]
    full_precision: dict[str, TaskResult]
    quantized: dict[str, TaskResult]
    by_seed: dict[int, dict[str, float]]  # seed -> task -> quantized score

    def deltas(self, tasks: Sequence[str]) -> list[Delta]:
        """The deltas of those tasks that the cell has."""
        return compare(*({name: side[name] for name in tasks if name in side} for side in self.sides))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted(self.by_seed))

    @property
    def sides(self) -> tuple[dict[str, TaskResult], dict[str, TaskResult]]:
        return self.full_precision, self.quantized


@dataclass(frozen=True)
class Evaluation:
    """A model evaluated in one way, and all the ways in which it was quantized."""

    name: str  # the model, and what is not usual in its evaluation
    full_precision: dict[str, TaskResult]
    cells: list[Cell]  # in order of appearance


@dataclass(frozen=True)
class Row:
    """A cell's deltas for the tasks of a group."""

    cell: Cell
    deltas: dict[str, Delta]  # by task
    overall: Delta  # its verdict corrected for the number of rows

    @property
    def spread(self) -> tuple[float, float] | None:
        """The lowest and the highest average of a seed; None where no seed has all tasks."""
        whole = [seed for seed in self.cell.by_seed.values() if self.deltas.keys() <= seed.keys()]
        means = [fmean(seed[name] for name in self.deltas) for seed in whole]
        return (min(means), max(means)) if means else None


@dataclass(frozen=True)
class RunGroup:
    """What one table shows: a model evaluated in one way on tasks that belong together."""

    name: str  # the model, and what is not usual in its evaluation
    kind: str  # of tasks: general, math and code, texts, or all
    tasks: tuple[str, ...]
    full_precision: dict[str, TaskResult]
    rows: list[Row]  # by width, in order of appearance

    @property
    def title(self) -> str:
        return self.name if self.kind == "all" else f"{self.name}: {self.kind}"


def mean_over_seeds(results: Sequence[TaskResult]) -> TaskResult:
    """One result whose documents' scores are the means over the seeds. Raises ValueError for other documents."""
    first = results[0]
    for other in results[1:]:
        if [row.doc_id for row in other.documents] != [row.doc_id for row in first.documents]:
            raise ValueError(f"task {first.name}: the seeds hold different documents; evaluate them with one limit")
    scores = [fmean(result.documents[i].score for result in results) for i in range(first.n)]
    rows = [replace(row, score=score) for row, score in zip(first.documents, scores, strict=True)]
    return replace(first, documents=rows, value=fmean(row.score for row in rows))


def flat(value: Any, key: str = "") -> dict[str, str]:
    """Settings by their dotted names, as text. What is None, false or empty is left out: older records lack the key.

    Of a part's class the name alone is kept, wherever its module lies.
    """
    if isinstance(value, Mapping):
        inner = (flat(v, f"{key}.{k}" if key else str(k)) for k, v in value.items())
        return {name: text for part in inner for name, text in part.items()}
    if value is None or value is False or value == [] or value == "":
        return {}
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return {key: text.rpartition(".")[2] if key.endswith("._target_") else text}


def told_by(config: Mapping[str, Any], fingerprint: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """How a run was evaluated, without its tasks, and how it was quantized; the checkpoint by its fingerprint."""
    settings = {key: text for key, text in flat(config).items() if not f"{key}.".startswith(UNTOLD)}
    quantized = {key: text for key, text in settings.items() if key.partition(".")[0] in QUANTIZATION}
    evaluated = {key: text for key, text in settings.items() if key not in quantized}
    return evaluated | flat({"checkpoint": fingerprint}), quantized


def settings(record: Record) -> tuple[dict[str, str], dict[str, str]]:
    """`told_by` of a run."""
    return told_by(record.config, record.model.get("fingerprint"))


def evaluations(runs: Sequence[Run]) -> list[Evaluation]:
    """The runs sorted by how they were evaluated. Raises ValueError where seeds hold different documents."""
    alike: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        alike.setdefault(tuple(sorted(settings(run.record)[0].items())), []).append(run)
    tasks: dict[int, dict[str, str]] = {}
    for members in alike.values():
        tasks |= zip(map(id, members), _contested(members), strict=True)
    named = _named(runs, words.evaluation, lambda run: settings(run.record)[0] | tasks[id(run)])
    return [Evaluation(name, _means(_latest(part), SIDES[0]), _cells(part)) for name, part in named]


def groups(evaluated: Sequence[Evaluation]) -> list[RunGroup]:
    """One group per evaluation and kind of tasks. Full precision is a row of its own, so runs of fp16 are none."""
    return [
        RunGroup(way.name, kind, tasks, {task: way.full_precision[task] for task in tasks}, _rows(way.cells, tasks))
        for way in evaluated
        for kind, tasks in task_kinds(way.full_precision).items()
    ]


def _rows(cells: Sequence[Cell], tasks: Sequence[str]) -> list[Row]:
    shown = [c for c in cells if c.method != FULL_PRECISION and any(task in c.quantized for task in tasks)]
    shown.sort(key=lambda cell: natural(cell.bits), reverse=True)
    deltas = [cell.deltas(tasks) for cell in shown]
    return [
        Row(cell, {row.name: row for row in rows if row.kind == "task"}, overall)
        for cell, rows, overall in zip(shown, deltas, judged([headline(rows) for rows in deltas]), strict=True)
    ]


def task_kinds(results: Mapping[str, TaskResult]) -> dict[str, tuple[str, ...]]:
    """The tasks as the study's tables divide them, where both kinds have several; texts stand by themselves."""
    texts = tuple(name for name, result in results.items() if result.metric == NLL)
    general = tuple(n for n, result in results.items() if n not in texts and result.category == "general")
    others = tuple(name for name in results if name not in (*texts, *general))
    if len(general) > 1 and len(others) > 1:
        kinds = {"general tasks": general, "math and code": others}
    else:
        kinds = {"all": tuple(name for name in results if name not in texts)}
    if texts:
        kinds["texts" if kinds.get("all", True) else "all"] = texts
    return {kind: tasks for kind, tasks in kinds.items() if tasks}


def _contested(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Of every run the settings of those tasks that not all of them set alike."""
    suites = [flat(run.record.settings.tasks, "task.suite") for run in runs]
    contested = []
    for task in {name for run in runs for name in run.record.quantized}:
        prefix = f"task.suite.{task}."
        specs = [{k: v for k, v in suite.items() if k.startswith(prefix)} for suite in suites]
        if any(a != b for a, b in pairwise(filter(None, specs))):
            contested.append(prefix)
    return [{k: v for k, v in suite.items() if k.startswith(tuple(contested))} for suite in suites]


def _named(
    runs: Sequence[Run], name: Callable[[RunSettings], str], told: Callable[[Run], dict[str, str]]
) -> list[tuple[str, list[Run]]]:
    """Runs of the same settings together, under names that tell them apart."""
    parts: dict[tuple[str, tuple[tuple[str, str], ...]], list[Run]] = {}
    for run in runs:
        parts.setdefault((name(run.record.settings), tuple(sorted(told(run).items()))), []).append(run)
    names = told_apart([(name, dict(own)) for name, own in parts])
    return list(zip(names, parts.values(), strict=True))


def told_apart(named: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    """The names, those that are alike followed by the settings in which they differ."""
    names = []
    for name, own in named:
        alike = [settings for other, settings in named if other == name]
        keys = sorted({key for one in alike for key in one if any(one[key] != s.get(key) for s in alike)})
        names.append(", ".join([name, *(f"{key}={own[key]}" for key in keys if key in own)]))
    return names


def _cells(runs: Sequence[Run]) -> list[Cell]:
    """The runs of an evaluation by how they were quantized."""
    by_bits: dict[str, list[Run]] = {}
    for run in runs:
        by_bits.setdefault(run.record.settings.bits, []).append(run)
    return [
        _cell(label, bits, part)
        for bits, members in by_bits.items()
        for label, part in _named(members, words.quantization, lambda run: settings(run.record)[1])
    ]


def _cell(label: str, bits: str, runs: Sequence[Run]) -> Cell:
    latest = _latest(runs)
    full_precision, quantized = (_means(latest, side) for side in SIDES)
    used = {id(record) for by_seed in latest.values() for record in by_seed.values()}
    scores: dict[int, dict[str, float]] = {}
    for task, by_seed in latest.items():
        for seed, record in by_seed.items():
            scores.setdefault(seed, {})[task] = record.quantized[task].value
    average_bits = fmean(float(run.record.average_bits or 16) for run in runs)
    counted = tuple(run for run in runs if id(run.record) in used)
    return Cell(label, bits, average_bits, counted, full_precision, quantized, by_seed=scores)


def _latest(runs: Sequence[Run]) -> dict[str, dict[int, Record]]:
    """The record of every task and seed; later runs replace earlier ones of the same seed, task by task."""
    latest: dict[str, dict[int, Record]] = {}
    for run in runs:
        for task in run.record.quantized:
            latest.setdefault(task, {})[run.record.settings.seed] = run.record
    return latest


def _means(latest: Mapping[str, Mapping[int, Record]], side: str) -> dict[str, TaskResult]:
    """One side's results, means over the seeds."""
    return {
        task: mean_over_seeds([getattr(by_seed[seed], side)[task] for seed in sorted(by_seed)])
        for task, by_seed in latest.items()
    }
