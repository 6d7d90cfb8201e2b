"""Markdown tables of many runs: methods by widths, the mean over seeds, each with its interval.

    dqx tables runs/2026-11-20 > table.md

Runs of one model, method, width and calibration that differ in nothing but the seed make one cell. The document is the
unit of chance: each document's score is averaged over the seeds first, then documents are paired with full precision
(`dqx/deltas.py`), so more seeds make the calibration's luck smaller but never claim more documents than there are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.text import Text

from dqx.compare import differences
from dqx.deltas import Delta, compare, headline, judged
from dqx.evaluate.results import TaskResult
from dqx.names import method_label, natural
from dqx.report import difference, value
from dqx.store import Record, RunFolder


@dataclass(frozen=True)
class Cell:
    """One method at one width: the runs behind it, and its deltas over the mean of their seeds."""

    model: str
    method: str
    bits: str
    average_bits: float
    seeds: tuple[int, ...]
    deltas: list[Delta]
    by_seed: tuple[float, ...]  # the overall average of each seed

    @property
    def overall(self) -> Delta:
        return headline(self.deltas)


def mean_over_seeds(results: Sequence[TaskResult]) -> TaskResult:
    """One result whose documents' scores are the means over the seeds. Raises ValueError for other documents."""
    first = results[0]
    for other in results[1:]:
        if [row.doc_id for row in other.documents] != [row.doc_id for row in first.documents]:
            raise ValueError(f"task {first.name}: the seeds hold different documents; evaluate them with one limit")
    rows = [
        replace(first.documents[i], score=fmean(result.documents[i].score for result in results))
        for i in range(first.n)
    ]
    return replace(first, documents=rows, value=fmean(row.score for row in rows))


def cells(records: Iterable[Record]) -> list[Cell]:
    """The records sorted into cells, in order of appearance. Of two runs alike in everything the later one counts.

    Raises ValueError where runs of one cell differ in more than the seed: neither may hide the other.
    """
    groups: dict[tuple[str, str, str], dict[int, Record]] = {}
    for record in sorted(records, key=lambda r: r.created):
        config = record.config
        method = method_label(config["method"]["name"], config["method"].get("variant"))
        masking = config["calib"]["masking"]
        label = method if masking == "clean" else f"{method}, {masking}"
        model = ", ".join((record.model["name"], *record.approximations))
        group = groups.setdefault((model, label, config["bits"]["name"]), {})
        for other in list(group.values())[:1]:
            changed = [line for line in differences(other.config, config) if not line.startswith("seed: ")]
            if changed:
                raise ValueError(
                    f"two runs of {model}, {label} {config['bits']['name']} differ in more than the seed: "
                    f"{'; '.join(changed)}; name only folders of runs that belong in one table"
                )
        group[int(config["seed"])] = record
    found = []
    for (model, method, bits), by_seed in groups.items():
        runs = [by_seed[seed] for seed in sorted(by_seed)]
        sides = [
            {name: mean_over_seeds([getattr(run, side)[name] for run in runs]) for name in runs[0].quantized}
            for side in ("full_precision", "quantized")
        ]
        average_bits = fmean(float(run.average_bits or 16) for run in runs)
        alone = tuple(headline(run.deltas).quantized for run in runs)
        found.append(Cell(model, method, bits, average_bits, tuple(sorted(by_seed)), compare(*sides), alone))
    return found


def matrix(members: Sequence[Cell]) -> list[str]:
    """Methods by widths: the average accuracy in percent and its delta in points (of a text alone: nats per token)."""
    widths = sorted({cell.bits for cell in members}, key=natural, reverse=True)
    methods = list(dict.fromkeys(cell.method for cell in members))
    lines = ["| method | " + " | ".join(widths) + " |", "|---" * (len(widths) + 1) + "|"]
    for method in methods:
        row = {cell.bits: cell for cell in members if cell.method == method}
        lines.append(f"| `{method}` | " + " | ".join(_short(row.get(width)) for width in widths) + " |")
    return lines


def _short(cell: Cell | None) -> str:
    if cell is None:
        return ""
    delta = cell.overall
    return f"**{value(delta.quantized, delta.metric)}** {difference(delta.delta, delta.metric)} {_interval(delta)}"


def _interval(delta: Delta) -> str:
    if delta.low is None or delta.high is None:
        return ""
    return f"[{difference(delta.low, delta.metric)}, {difference(delta.high, delta.metric)}]"


def details(members: Sequence[Cell]) -> list[str]:
    """One row per cell: every task, the average with interval, level and verdict, and how far the seeds lie apart.

    The verdicts are corrected for the number of rows.
    """
    tasks = [delta.name for delta in members[0].deltas if delta.kind == "task"]
    header = [
        "method",
        "bits",
        "bits per weight",
        *tasks,
        "average",
        "delta [95 % interval]",
        "level",
        "verdict",
        "seeds: low, high",
    ]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    full = {delta.name: delta for delta in members[0].deltas}
    values = [value(full[task].full_precision, full[task].metric) for task in tasks]
    average = f"**{value(members[0].overall.full_precision, members[0].overall.metric)}**"
    lines.append("| " + " | ".join(["full precision", "", "16", *values, average, "", "", "", ""]) + " |")
    for cell, delta in zip(members, judged([cell.overall for cell in members]), strict=True):
        by_name = {delta.name: delta for delta in cell.deltas}
        values = [value(by_name[t].quantized, by_name[t].metric) if t in by_name else "" for t in tasks]
        lowest, highest = (value(side(cell.by_seed), delta.metric) for side in (min, max))
        row = [
            f"`{cell.method}`",
            cell.bits,
            f"{cell.average_bits:.2f}",
            *values,
            f"**{value(delta.quantized, delta.metric)}**",
            f"{difference(delta.delta, delta.metric)} {_interval(delta)}",
            delta.level or "-",
            delta.verdict,
            f"{len(cell.seeds)}: {lowest}, {highest}",
        ]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def markdown(found: Sequence[Cell]) -> str:
    """Both tables of every model."""
    parts = []
    for model in dict.fromkeys(cell.model for cell in found):
        members = sorted(
            (cell for cell in found if cell.model == model), key=lambda cell: natural(cell.bits), reverse=True
        )
        parts += [f"### {model}", "", *matrix(members), "", *details(members), ""]
    return "\n".join(parts)


def read(folders: Iterable[str | Path]) -> list[Record]:
    """The finished runs below the folders."""
    paths = sorted({path.parent for folder in folders for path in Path(folder).rglob("results.json")})
    return [RunFolder(path).read() for path in paths]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Markdown tables of all finished runs below the given folders.",
        epilog="Example: dqx tables runs/2026-11-20 > table.md",
    )
    parser.add_argument("folders", nargs="+", help="folders of runs or sweeps")
    arguments = parser.parse_args()
    try:
        records = read(arguments.folders)
        if not records:
            raise ValueError(f"no finished run below {', '.join(arguments.folders)}")
        print(markdown(cells(records)))
    except (OSError, ValueError) as error:
        Console(stderr=True).print(Text(str(error)), soft_wrap=True)
        sys.exit(2)
