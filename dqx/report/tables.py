"""Everything that is shown as a table, whatever it is written in: the terminal, Markdown, LaTeX or HTML.

A table is columns and rows of entries; how an entry looks is left to those who write it. Of one run: its deltas and its
outliers; of a sweep: a row per run; of groups of runs: methods by widths, and the study's layout.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

from dqx.common.names import enumerated, natural
from dqx.diagnostics.activations import summary
from dqx.evaluate.results import TaskResult
from dqx.evaluate.spec import NLL
from dqx.record import significance, words
from dqx.record.collection import Run
from dqx.record.deltas import Delta, headline, judged
from dqx.record.folder import SIDES, Record
from dqx.record.words import difference, points, short, value
from dqx.report.gather import Row, RunGroup

MISSING, PARTIAL = "missing", "partial"
P_VALUE = "p (corrected)"


@dataclass(frozen=True)
class Entry:
    """One place of a table."""

    text: str = ""
    small: str = ""  # beside the text, in smaller print
    number: float | None = None  # by which its column is sorted; None: by the text
    kind: str = ""  # missing; partial; a verdict (better, worse, unclear; within, differs); a run's state
    code: bool = False  # a name of the configuration
    anchor: str = ""  # where a link leads to, inside a page
    best: bool = False  # of all methods in the same setting


@dataclass(frozen=True)
class Table:
    """`head` holds the rows that stay on top however the others are sorted."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Entry]]
    head: list[list[Entry]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    left: int = 1  # columns with text, from the left
    stacked: bool = False  # the smaller print may stand below its text
    rules: tuple[int, ...] = ()  # rows above which a rule is drawn, where a table is not sorted
    strong: tuple[int, ...] = ()  # rows in bold, where a table is not sorted
    spare: tuple[str, ...] = ()  # columns that are left out first where the table is too wide, in this order
    apart: tuple[str, ...] = ()  # columns that then make tables of their own

    def only(self, columns: Collection[str]) -> Table:
        """The table with these of its columns alone."""
        kept = [i for i, name in enumerate(self.columns) if name in columns]

        def cut(rows: list[list[Entry]]) -> list[list[Entry]]:
            return [[row[i] for i in kept] for row in rows]

        left = sum(i < self.left for i in kept)
        names = tuple(self.columns[i] for i in kept)
        notes = tuple(note for note in self.notes if note != DROP or "drop" in names)
        return replace(self, columns=names, rows=cut(self.rows), head=cut(self.head), left=left, notes=notes)


STAR = "* chance alone does not explain the difference (exact tests at 5 %, corrected for the number of rows)."
DROP = "Drop: by how much the score fell, relative to full precision, in the study's levels; it says nothing of chance."
UNITS = "Accuracy in percent; delta from full precision in points, with a 95 % interval over documents."
TEXTS = "Texts in nats per token, lower is better; a delta is the log of the ratio of perplexities."
CHANCE = "Verdict: better or worse where p, corrected, is at most 5 % and the interval leaves out 0"
SIDE_NAMES = {"full_precision": "before", "quantized": "after"}


def deltas(rows: Sequence[Delta], before: str = "full precision", after: str = "quantized") -> Table:
    """One side against another: per task, per category, on average."""
    columns = ("task", "documents", before, after, "delta [95 % interval]", P_VALUE, "verdict")
    return Table(
        "Tasks",
        (*columns, "relative drop, %", "drop", "lost/gained"),
        [
            [
                Entry(f"{row.category} average" if row.kind == "category" else row.name, code=row.kind == "task"),
                Entry(str(row.n), number=row.n),
                score(row.full_precision, row.metric),
                score(row.quantized, row.metric),
                _delta(row),
                _p(row),
                _verdict(row),
                _drop(row),
                _level(row),
                Entry(f"{row.lost}/{row.gained}", number=row.lost),
            ]
            for row in rows
        ],
        notes=tuple(_delta_notes(rows)),
        spare=("relative drop, %", "lost/gained", "documents"),
        rules=changes([row.kind for row in rows]),
        strong=tuple(i for i, row in enumerate(rows) if row.kind == "overall"),
    )


def forwards(rows: Sequence[Delta]) -> Table:
    """What answers take, one side against the other, where that depends on the model."""
    shown = deltas(rows).only(
        ("task", "documents", "full precision", "quantized", "delta [95 % interval]", P_VALUE, "verdict")
    )
    told = "Forwards per token: sequences through the model by tokens written, mean over documents; less is better."
    return replace(shown, title="Forwards per token", notes=(told, f"{CHANCE}."))


def _delta_notes(rows: Sequence[Delta]) -> list[str]:
    """What the table's words mean, and what the sample could have shown."""
    notes = []
    if any(not row.lower_is_better for row in rows):
        notes.append("In percent, deltas in points. Every task counts the same in an average.")
    if any(row.lower_is_better for row in rows):
        notes.append("Texts: nats per token, lower is better; a delta is the log of a perplexity ratio.")
    notes.append(f"{CHANCE}. p: exact tests over documents; in brackets corrected for the number of tasks.")
    notes.append(DROP)
    first = headline(rows)
    if first.resolvable is not None:
        least = difference(first.resolvable, first.metric).removeprefix("+")
        unit = "nats" if first.lower_is_better else "points"
        where = "on average" if first.kind == "overall" else f"in {first.name}"
        notes.append(f"A sample like this finds a difference of {least} {unit} {where} four times in five.")
    return notes


def sweep(records: Sequence[Record]) -> Table:
    """Runs in the order given, those with the same full-precision accuracies below a row that shows them."""
    tasks = list(dict.fromkeys(name for record in records for name in record.full_precision))
    alike: dict[tuple[object, ...], list[tuple[Record, Delta]]] = {}
    for record, delta in zip(records, judged([headline(record.deltas) for record in records]), strict=True):
        values = ((name, result.value) for name, result in record.full_precision.items())
        alike.setdefault((words.sampling(record.settings), *values), []).append((record, delta))
    rows: list[list[Entry]] = []
    tops = []
    for (label, *_), members in alike.items():
        tops.append(len(rows))
        first, delta = members[0]
        top = [Entry(str(label)), Entry("16"), *(_result(first.full_precision.get(name)) for name in tasks)]
        rows.append([*top, score(delta.full_precision, delta.metric), *[Entry()] * 4])
        for record, delta in members:
            run, average = record.settings, record.average_bits
            name = [" ", run.method_label, run.bits, *([run.masking] if run.masking != "clean" else [])]
            entries = [Entry(" ".join(name)), Entry("-" if average is None else f"{average:.2f}")]
            entries += [_result(record.quantized.get(task)) for task in tasks]
            entries += [score(delta.quantized, delta.metric), _delta(delta), _p(delta), _verdict(delta), _level(delta)]
            rows.append(entries)
    several = len(tasks) > 1
    average_of = ["average"] if several else []
    columns = ("run", "bits per weight", *tasks, "average", "delta [95 % interval]", P_VALUE, "verdict", "drop")
    table = Table(
        "Sweep",
        columns,
        rows,
        notes=(
            *words.meanings(_widths(record) for record in records),
            "In percent, deltas in points; texts in nats per token; - where a task was not run.",
            f"{CHANCE}. p: exact tests over documents; in brackets corrected for the number of runs.",
            DROP,
        ),
        rules=tuple(tops),
        strong=tuple(tops),
        spare=("drop",),
        apart=tuple(tasks) if several else (),
    )
    return table.only([*columns[: 2 + len(tasks)], *average_of, *columns[3 + len(tasks) :]])


def _widths(record: Record) -> tuple[str, str, str]:
    """The choice of widths, the method, and what the choice means with it."""
    run = record.settings
    return record.choices.get("bits", run.bits), run.method_label, run.bits


def outliers(record: Record) -> Table:
    """Per site the block with the largest activation, before and after quantization."""
    by_side = {side: {row["site"]: row for row in summary(stats)} for side, stats in record.outliers.items()}
    limits = next(iter(record.outliers.values())).thresholds
    share = f"{100 * limits.channel_share:g} %"
    notes = (
        "Each row shows the block with the largest |x| at that place.",
        f"Outlier channel: |x| > {limits.channel_ratio:g} x the token's median, on at least {share} of tokens.",
        f"Massive: |x| >= {limits.massive_absolute:g} and >= {limits.massive_relative:g} x median; "
        "relative only: the second alone.",
    )
    columns = ("linear inputs", "quantization", "block", "abs max", "median", "max / median", "outlier channels")
    relative = "relative only: values, tokens"
    return Table(
        "Outliers",
        (*columns, "massive values", "on tokens", relative),
        [
            [Entry(site), Entry(SIDE_NAMES[side]), *map(Entry, _outlier_cells(by_side[side][site]))]
            for site in next(iter(by_side.values()))
            for side in SIDES
            if side in by_side
        ],
        notes=notes,
        left=2,
        spare=(relative, "median", "on tokens"),
    )


def _outlier_cells(row: dict[str, Any]) -> list[str]:
    ratio = row["max_over_median"]
    return [
        str(row["block"]),
        short(row["abs_max"]) + (f" ({row['not_finite']} not finite)" if row["not_finite"] else ""),
        short(row["median"]),
        "-" if ratio is None else short(ratio),
        f"{row['outlier_channels']}/{row['channels']}",
        str(row["massive_values"]),
        f"{100 * row['massive_token_share']:.1f} %",
        f"{row['relative_values']}, {100 * row['relative_token_share']:.1f} %",
    ]


def runs(members: Sequence[Run]) -> Table:
    """One row per run, with a link to what else is known of it."""
    rows = []
    for number, record in enumerate((run.record for run in members), 1):
        run, total, average = record.settings, headline(record.deltas), record.average_bits
        seconds = sum(record.timings.values())
        row = [Entry(f"run\xa0{number}", number=number, anchor=anchor(number)), Entry(words.evaluation(run))]
        row += [Entry(words.quantization(run), code=True), Entry(run.bits, code=True)]
        row += [Entry(str(run.seed), number=run.seed)]
        row += [Entry("16" if average is None else f"{average:.2f}", number=average or 16.0)]
        row += [score(total.quantized, total.metric), _delta(total), _verdict(total), _level(total)]
        row += [Entry(f"{seconds:.0f}", number=seconds), Entry(record.created[:16].replace("T", " "))]
        rows.append(row)
    columns = ("run", "model", "method", "setting", "seed", "bits per weight", "average", "delta [95 % interval]")
    return Table("Runs", (*columns, "verdict", "drop", "seconds", "finished, UTC"), rows, left=4)


def anchor(number: int) -> str:
    """Where a page tells of a run."""
    return f"run-{number}"


def overview(group: RunGroup) -> Table:
    """Methods by widths: the average, and its delta from full precision."""
    widths = sorted({row.cell.bits for row in group.rows}, key=natural, reverse=True)
    places = {(row.cell.method, row.cell.bits): row for row in group.rows}
    lower = any(row.overall.lower_is_better for row in group.rows)
    return Table(
        title=group.title,
        columns=("method", *widths),
        head=[[Entry("full precision"), *[_full_precision(group)] * len(widths)]],
        rows=with_best(
            [
                [Entry(method, code=True), *(_average_and_delta(places.get((method, w)), group) for w in widths)]
                for method in dict.fromkeys(row.cell.method for row in group.rows)
            ],
            dict.fromkeys(range(1, 1 + len(widths)), lower),
        ),
        notes=(f"{_what(group)}; in brackets the delta from full precision.", STAR),
    )


def study(group: RunGroup) -> Table:
    """The study's layout: settings by methods, tasks, average, our interval and test, relative drop and its level."""
    averaged = len(accuracies(group)) > 1
    seeds = any(len(row.cell.seeds) > 1 for row in group.rows)
    columns = ["setting", "method", "bits per weight", *group.tasks, *(["average"] if averaged else [])]
    columns += ["delta [95 % interval]", P_VALUE, "verdict", "relative drop, %", "drop"]
    columns += ["seeds: lowest, highest"] if seeds else []
    texts = any(result.metric == NLL for result in group.full_precision.values())
    top = [Entry("full precision"), Entry(), Entry("16", number=16), *map(_result, group.full_precision.values())]
    top += [_full_precision(group)] if averaged else []
    scores = {3 + i: result.metric == NLL for i, result in enumerate(group.full_precision.values())}
    rules = changes([row.cell.bits for row in group.rows])
    rows = [_row(row, group, averaged=averaged, seeds=seeds) for row in group.rows]
    return Table(
        title=group.title,
        columns=tuple(columns),
        head=[top + [Entry()] * (len(columns) - len(top))],
        rows=with_best(rows, scores | ({3 + len(scores): False} if averaged else {}), rules),
        notes=(
            UNITS,
            *([TEXTS] if texts else []),
            f"{CHANCE}. p: exact tests over documents; in brackets corrected for the number of rows.",
            DROP,
        ),
        left=2,
        rules=rules,
    )


def _row(row: Row, group: RunGroup, *, averaged: bool, seeds: bool) -> list[Entry]:
    cell, total = row.cell, row.overall
    entries = [Entry(cell.bits, code=True), Entry(cell.method, code=True)]
    entries.append(Entry(f"{cell.average_bits:.2f}", number=cell.average_bits))
    of_tasks = map(row.deltas.get, group.tasks)
    entries += [score(d.quantized, d.metric) if d else Entry(MISSING, kind=MISSING) for d in of_tasks]
    if averaged:
        entries.append(_average(row, group))
    entries += [_delta(total), _p(total), _verdict(total), _drop(total), _level(total)]
    if seeds:
        limits = ", ".join(value(side, total.metric) for side in row.spread or ())
        entries.append(Entry(f"{len(cell.seeds)}: {limits or '-'}", number=len(cell.seeds)))
    return entries


def accuracies(group: RunGroup) -> list[str]:
    """The tasks that an average is made of."""
    return [name for name, result in group.full_precision.items() if result.metric != NLL] or list(group.tasks)


def score(number: float, metric: str | None) -> Entry:
    """A score in percent or nats."""
    return Entry(value(number, metric), number=number)


def _result(result: TaskResult | None) -> Entry:
    return Entry("-") if result is None else score(result.value, result.metric)


def _full_precision(group: RunGroup) -> Entry:
    """The group's average at full precision."""
    results = [group.full_precision[name] for name in accuracies(group)]
    return Entry(value(fmean(result.value for result in results), results[0].metric))


def _delta(row: Delta, star: str = "") -> Entry:
    """A delta with its interval; followed by the star where chance alone does not explain it."""
    text = difference(row.delta, row.metric) + ("" if row.verdict == significance.UNDECIDED else star)
    return Entry(text, words.interval(row.low, row.high, row.metric), row.delta)


def _drop(row: Delta) -> Entry:
    drop = row.relative_drop
    return Entry("-") if drop is None else Entry(points(drop).removeprefix("+"), number=drop)


def _level(row: Delta) -> Entry:
    return Entry(row.level or "-", number=row.relative_drop)


def _p(row: Delta) -> Entry:
    own, _, corrected = words.probability(row.p_value, row.p_adjusted).partition(" ")
    return Entry(own, corrected, row.p_adjusted)


def _verdict(row: Delta) -> Entry:
    verdict = words.verdict(row.verdict)
    return Entry(verdict, kind=verdict)


def _average(row: Row, group: RunGroup) -> Entry:
    """The average; of fewer tasks than the table has, it says of how many."""
    has, wanted = (sum(task in names for task in accuracies(group)) for names in (row.deltas, group.tasks))
    number, part = value(row.overall.quantized, row.overall.metric), has < wanted
    small, kind = (f"{has} of {wanted} tasks", PARTIAL) if part else ("", "")
    return Entry(number, small, row.overall.quantized, kind)


def _average_and_delta(row: Row | None, group: RunGroup) -> Entry:
    if row is None:
        return Entry()
    average, delta = _average(row, group), _delta(row.overall, STAR[0])
    small = f"({delta.text}) {average.small}".strip()
    kind = average.kind or words.verdict(row.overall.verdict)
    return Entry(average.text, small, average.number, kind)


def _what(group: RunGroup) -> str:
    tasks = accuracies(group)
    if group.full_precision[tasks[0]].metric == NLL:
        return f"Nats per token on {enumerated(tasks)}"
    return f"{'Mean accuracy in percent over' if tasks[1:] else 'Accuracy in percent on'} {enumerated(tasks)}"


def with_best(rows: list[list[Entry]], scores: Mapping[int, bool], rules: Sequence[int] = ()) -> list[list[Entry]]:
    """The rows with the best entry of each column of scores marked, between one rule and the next; ties all are.

    `scores` says of a column whether lower is better. Averages of fewer tasks than the table has do not compete.
    """
    marked = [list(row) for row in rows]
    for start, end in pairwise((0, *rules, len(rows))):
        for column, lower in scores.items():
            entries = ((row[column], row) for row in marked[start:end])
            whole = [(e.number, e, row) for e, row in entries if e.number is not None and e.kind != PARTIAL]
            best = {number: entry.text for number, entry, _ in whole}
            for _, entry, row in whole if len(whole) > 1 else ():
                row[column] = replace(entry, best=entry.text == best[min(best) if lower else max(best)])
    return marked


def changes(names: Sequence[str]) -> tuple[int, ...]:
    """The places where a name is not the one before."""
    return tuple(i for i, (before, name) in enumerate(pairwise(names), 1) if before != name)
