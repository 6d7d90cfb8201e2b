"""What a report says, before it is written in one format or another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dqx.common.names import enumerated, natural
from dqx.record.deltas import headline
from dqx.record.folder import Record
from dqx.record.words import value
from dqx.report import published, tables
from dqx.report.gather import Run, Skipped, evaluation_name, evaluations, gather, groups, quantization_name
from dqx.report.published import Comparison
from dqx.report.tables import Entry, Table
from dqx.report.terminal import header


@dataclass(frozen=True)
class Picture:
    """A figure that was saved as a PNG; `width` is the number of pixels that it has in a page."""

    name: str
    path: Path
    width: int

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")


@dataclass
class Report:
    """Runs, the tables made of them, and their figures."""

    runs: list[Run]
    skipped: list[Skipped]
    overviews: list[Table]
    studies: list[Table]
    comparisons: list[Comparison]
    pictures: list[Picture] = field(default_factory=list)  # of all runs together
    run_pictures: list[list[Picture]] = field(default_factory=list)  # of each run

    @property
    def records(self) -> list[Record]:
        return [run.record for run in self.runs]


def build(folders: Iterable[str | Path], presets: Sequence[str] = ()) -> Report:
    """The report of all finished runs below the folders, without figures.

    With the presets of the published tables that are named, else with those that the runs have cells of. Raises
    ValueError where there is nothing to report, OSError for a folder that does not exist.
    """
    folders = list(folders)
    runs, skipped = gather(folders)
    if not runs and not presets:
        reasons = "".join(f"\n  {each.path}: {each.reason}" for each in skipped)
        raise ValueError(f"no finished run below {', '.join(map(str, folders))}{reasons}")
    return of_runs(runs, skipped, presets)


def of_runs(runs: list[Run], skipped: Sequence[Skipped] = (), presets: Sequence[str] = ()) -> Report:
    """The report of runs that are read already."""
    found = evaluations(runs)
    sorted_runs = groups(found)
    return Report(
        runs,
        list(skipped),
        [tables.overview(group) for group in sorted_runs if group.rows],
        [tables.study(group) for group in sorted_runs],
        [published.compared(preset, found) for preset in presets or published.present(found)],
    )


def lede(records: Sequence[Record]) -> str:
    """What was run, in one sentence."""
    if not records:
        return "No finished run."
    count = f"{len(records)} {'run' if len(records) == 1 else 'runs'}"
    parts = [
        f"{count} of {_distinct(evaluation_name(record) for record in records)}",
        f"{_distinct(quantization_name(record) for record in records)} at {_distinct(widths(records))}",
        f"on {_distinct(name for record in records for name in record.quantized)}",
        f"{_plural('seed', sorted({int(record.config['seed']) for record in records}))}",
    ]
    return ", ".join(parts) + "."


def widths(records: Sequence[Record]) -> list[str]:
    """The names of the widths, widest first."""
    return sorted({str(record.config["bits"]["name"]) for record in records}, key=natural, reverse=True)


def runs_table(runs: Sequence[Run]) -> Table:
    """One row per run, with a link to what else is known of it."""
    rows = []
    for number, run in enumerate(runs, 1):
        record, total = run.record, headline(run.record.deltas)
        average, seconds = record.average_bits, sum(record.timings.values())
        rows.append(
            [
                Entry(f"run\xa0{number}", number=number, anchor=anchor(number)),
                Entry(evaluation_name(record)),
                Entry(quantization_name(record), code=True),
                Entry(str(record.config["bits"]["name"]), code=True),
                Entry(str(record.config["seed"]), number=int(record.config["seed"])),
                Entry("16" if average is None else f"{average:.2f}", number=average or 16.0),
                Entry(value(total.quantized, total.metric), number=total.quantized),
                Entry(tables.starred(total), tables.interval(total), number=total.delta),
                Entry(total.level or "-", kind=total.level or "", number=total.relative_drop),
                Entry(f"{seconds:.0f}", number=seconds),
                Entry(record.created[:16].replace("T", " ")),
            ]
        )
    columns = ("run", "model", "method", "setting", "seed", "bits per weight", "average", "delta [95 % interval]")
    return Table("Runs", (*columns, "level", "seconds", "finished, UTC"), rows, [], left=4)


def anchor(number: int) -> str:
    """Where a page tells of a run."""
    return f"run-{number}"


def name_of(record: Record) -> str:
    """A run in a few words."""
    return header(record)[0]


def lacks(record: Record) -> list[str]:
    """What a record does not have, and the setting that would have measured it."""
    missing = []
    if not record.outliers:
        missing.append("no outlier statistics (outliers.samples=0)")
    elif not getattr(record, "activations", None):
        missing.append("no activations per channel and token")
    if not record.fidelity:
        missing.append("no denoising diagnostics (fidelity.samples=0)")
    elif not record.fidelity.get("by_step"):
        missing.append("no diagnostics by denoising step")
    return missing


def delta_rows(record: Record) -> Table:
    """The record's own deltas: per task, per category, on average."""
    return Table(
        "Tasks",
        ("task", "documents", "full precision", "quantized", "delta [95 % interval]", "level", "lost / gained", "p"),
        [
            [
                Entry(f"{row.category} average" if row.kind == "category" else row.name, code=row.kind == "task"),
                Entry(str(row.n), number=row.n),
                tables.score(row.full_precision, row.metric),
                tables.score(row.quantized, row.metric),
                Entry(tables.starred(row), tables.interval(row), number=row.delta),
                Entry(row.level or "-", kind=row.level or "", number=row.relative_drop),
                Entry(f"{row.lost} / {row.gained}", number=row.lost),
                Entry(f"{row.p_adjusted:.2g}", number=row.p_adjusted),
            ]
            for row in record.deltas
        ],
        [],
    )


def _distinct(names: Iterable[str]) -> str:
    return enumerated(list(dict.fromkeys(names)))


def _plural(word: str, values: Sequence[int]) -> str:
    return f"{word}{'' if len(values) == 1 else 's'} {_distinct(map(str, values))}"
