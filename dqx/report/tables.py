"""Groups of runs as tables, whatever they are written in: methods by widths, and the study's layout.

A table is columns and rows of entries; how an entry looks is left to those who write it.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from dqx.common.names import enumerated, natural
from dqx.evaluate.spec import NLL
from dqx.record import statistics
from dqx.record.deltas import Delta
from dqx.record.words import difference, points, value
from dqx.report.gather import Group, Row

MISSING = "missing"


@dataclass(frozen=True)
class Entry:
    """One place of a table."""

    text: str = ""
    small: str = ""  # beside the text, in smaller print
    number: float | None = None  # by which its column is sorted; None: by the text
    kind: str = ""  # missing; a level (negligible, moderate, significant); a verdict (within, differs)
    code: bool = False  # a name of the configuration
    anchor: str = ""  # where a link leads to, inside a page


@dataclass(frozen=True)
class Table:
    """`head` holds the rows that stay on top however the others are sorted."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Entry]]
    head: list[list[Entry]]
    notes: tuple[str, ...] = ()
    left: int = 1  # columns with text, from the left
    stacked: bool = False  # the smaller print may stand below its text


STAR = "* chance alone does not explain the difference (exact tests at 5 %, corrected for the number of rows)."
LEVELS = "Level: the relative drop alone; below 1 % negligible, up to 4 % moderate, above significant."
UNITS = "Accuracy in percent; delta from full precision in points, with a 95 % interval over documents."
TEXTS = "Texts in nats per token, lower is better; a delta is the log of the ratio of perplexities."


def overview(group: Group) -> Table:
    """Methods by widths: the average, and its delta from full precision."""
    widths = sorted({row.cell.bits for row in group.rows}, key=natural, reverse=True)
    places = {(row.cell.method, row.cell.bits): row for row in group.rows}
    return Table(
        title=group.title,
        columns=("method", *widths),
        head=[[Entry("full precision"), *[Entry(full_precision(group))] * len(widths)]],
        rows=[
            [Entry(method, code=True), *(_outcome(places.get((method, width)), group) for width in widths)]
            for method in dict.fromkeys(row.cell.method for row in group.rows)
        ],
        notes=(f"{_what(group)}; in brackets the delta from full precision.", STAR),
    )


def study(group: Group) -> Table:
    """The study's layout: settings by methods, tasks, average, relative drop, level, and our interval and test."""
    averaged = len(accuracies(group)) > 1
    seeds = any(len(row.cell.seeds) > 1 for row in group.rows)
    columns = ["setting", "method", "bits per weight", *group.tasks, *(["average"] if averaged else [])]
    columns += ["delta [95 % interval]", "relative drop, %", "level", *(["seeds: lowest, highest"] if seeds else [])]
    texts = any(result.metric == NLL for result in group.full_precision.values())
    top = [Entry("full precision"), Entry(), Entry("16", number=16)]
    top += [score(result.value, result.metric) for result in group.full_precision.values()]
    top += [Entry(full_precision(group))] if averaged else []
    return Table(
        title=group.title,
        columns=tuple(columns),
        head=[top + [Entry()] * (len(columns) - len(top))],
        rows=[_row(row, group, averaged=averaged, seeds=seeds) for row in group.rows],
        notes=(UNITS, *([TEXTS] if texts else []), STAR, LEVELS),
        left=2,
    )


def _row(row: Row, group: Group, *, averaged: bool, seeds: bool) -> list[Entry]:
    cell, total = row.cell, row.overall
    entries = [Entry(cell.bits, code=True), Entry(cell.method, code=True)]
    entries.append(Entry(f"{cell.average_bits:.2f}", number=cell.average_bits))
    entries += [
        score(row.deltas[task].quantized, row.deltas[task].metric) if task in row.deltas else missing()
        for task in group.tasks
    ]
    if averaged:
        entries.append(_average(row, group))
    drop = total.relative_drop
    entries += [
        Entry(starred(total), interval(total), number=total.delta),
        Entry("-") if drop is None else Entry(points(drop).removeprefix("+"), number=drop),
        Entry(total.level or "-", kind=total.level or "", number=drop),
    ]
    if seeds:
        limits = ", ".join(value(side, total.metric) for side in row.spread or ())
        entries.append(Entry(f"{len(cell.seeds)}: {limits or '-'}", number=len(cell.seeds)))
    return entries


def accuracies(group: Group) -> list[str]:
    """The tasks that an average is made of."""
    return [name for name, result in group.full_precision.items() if result.metric != NLL] or list(group.tasks)


def full_precision(group: Group) -> str:
    """The group's average at full precision."""
    results = [group.full_precision[name] for name in accuracies(group)]
    return value(fmean(result.value for result in results), results[0].metric)


def score(number: float, metric: str | None) -> Entry:
    """A score in percent or nats."""
    return Entry(value(number, metric), number=number)


def missing() -> Entry:
    """What no run has measured."""
    return Entry(MISSING, kind=MISSING)


def starred(delta: Delta) -> str:
    """A delta in points, with a star where chance alone does not explain it."""
    return difference(delta.delta, delta.metric) + ("" if delta.verdict == statistics.UNDECIDED else "*")


def interval(delta: Delta) -> str:
    """`[-3.8, +2.9]`; empty where one document cannot give one."""
    if delta.low is None or delta.high is None:
        return ""
    return f"[{difference(delta.low, delta.metric)}, {difference(delta.high, delta.metric)}]"


def _average(row: Row, group: Group) -> Entry:
    """The average; of fewer tasks than the table has, it says of how many."""
    has, wanted = (sum(task in names for task in accuracies(group)) for names in (row.deltas, group.tasks))
    return Entry(
        value(row.overall.quantized, row.overall.metric),
        f"{has} of {wanted} tasks" if has < wanted else "",
        number=row.overall.quantized,
    )


def _outcome(row: Row | None, group: Group) -> Entry:
    if row is None:
        return Entry()
    average = _average(row, group)
    delta = f"({starred(row.overall)})" + (f" {average.small}" if average.small else "")
    return Entry(average.text, delta, average.number, row.overall.level or "")


def _what(group: Group) -> str:
    tasks = accuracies(group)
    if group.full_precision[tasks[0]].metric == NLL:
        return f"Nats per token on {enumerated(tasks)}"
    return (
        f"Accuracy in percent on {tasks[0]}"
        if len(tasks) == 1
        else f"Mean accuracy in percent over {enumerated(tasks)}"
    )
