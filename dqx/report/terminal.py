"""A run's record in the terminal: what it cost, where the outliers sit, where the record lies.

Everything is ASCII with colour as a hint only, so that a log file reads like the screen. Tables fit 80 columns: a wider
one leaves out the columns that say least, which are in the report, or becomes several. Nothing is cut.
"""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TextIO

import rich.table
from rich import box
from rich.console import Console
from rich.text import Text

from dqx.common.names import enumerated
from dqx.record import words
from dqx.record.folder import Record
from dqx.record.outcomes import RunState
from dqx.record.words import short, visible
from dqx.report import tables
from dqx.report.tables import Entry, Table

#: Rules across, nothing down: head, head rule, rows, section rule, foot.
RULES = box.Box("    \n    \n -- \n    \n -- \n -- \n    \n    \n", ascii=True)
WIDTH = 80
COLOURS = {
    **dict.fromkeys(("better", "finished", "reused"), "green"),
    **dict.fromkeys(("unclear", "interrupted", "not started"), "yellow"),
    **dict.fromkeys(("worse", "failed", "refused"), "red"),
}
#: Columns whose names are broken in another place than at their last space.
NAMES = {
    "delta [95 % interval]": "delta\n[95 % interval]",
    "documents": "docu-\nments",
    "bits per weight": "bits/\nweight",
    "full precision": "full\nprec.",
    "lost/gained": "lost/\ngained",
    "quantization": "quanti-\nzation",
    "quantized": "quan-\ntized",
    "p (corrected)": "p\n(corrected)",
    "relative drop, %": "rel.\ndrop",
    "relative only: values, tokens": "relative only:\nvalues, tokens",
}
COMPLETE, INCOMPLETE = ("finished", "reused"), ("failed", "refused", "interrupted", "not started")  # states of runs
WORDS = ("drop", "verdict")  # columns of words beside those of numbers


def print_run(
    record: Record, folder: str | Path | None = None, again: str | None = None, file: TextIO | None = None
) -> None:
    """Print the tables of a record to `file` (standard output if None).

    `folder` is where the record lies, `again` the command that repeats the run.
    """
    console = _console(file)
    console.print()
    print_lines(console, _wrapped((words.title(record), words.conditions(record))), "bold")
    console.print()
    print_lines(console, show(tables.deltas(record.deltas), console), "dim")
    if record.forwards:
        console.print()
        print_lines(console, show(tables.forwards(record.forwards), console), "dim")
    if record.fidelity:
        console.print()
        print_lines(console, _wrapped(fidelity_lines(record.fidelity)))
    if record.outliers:
        console.print()
        print_lines(console, show(tables.outliers(record), console), "dim")
    console.print()
    print_lines(console, footer(record, folder, again))  # paths and commands stay in one piece, to be copied


def print_line(record: Record, name: str, file: TextIO | None = None) -> None:
    """Print what came of a run in one line that begins with its name."""
    print_lines(_console(file), [f"{name}: {words.outcome(record)}"])


def print_sweep(runs: Sequence[tuple[str, Record]], file: TextIO | None = None) -> None:
    """Print one row per run of a sweep, each a name and a record, and the notes of all runs, each note once."""
    console = _console(file)
    console.print()
    print_lines(console, show(tables.sweep([record for _, record in runs]), console), "dim")
    concerned: dict[str, list[str]] = {}
    for name, record in runs:
        for note in record.warnings:
            concerned.setdefault(note, []).append(name)
    if concerned:
        console.print()
    for note, names in concerned.items():
        whose = "all runs" if len(names) == len(runs) else enumerated(names)
        print_lines(console, [f"Note:    {note} ({whose})"])


def print_outcomes(outcomes: Mapping[Path, RunState], file: TextIO | None = None) -> None:
    """Print how many runs of a sweep ended in which way, where they lie, and what kept the others from finishing."""
    console = _console(file)
    console.print()
    counts = Counter(run.state for run in outcomes.values())
    folders = dict.fromkeys(str(path.parent) for path in outcomes)
    told = (f"{counts[state]} {state}" for state in (*COMPLETE, *INCOMPLETE) if counts[state])
    print_lines(console, [f"Runs:    {', '.join(told)}"])
    print_lines(console, (f"Records: {folder}" for folder in folders))
    rows = [
        [Entry(path.name), Entry(run.state, kind=run.state), Entry(run.reason)]
        for path, run in outcomes.items()
        if run.state not in COMPLETE
    ]
    if rows:
        console.print()
        console.print(rendered(Table("Runs", ("run", "state", "reason"), rows, left=3)))


def print_export(out: Path, notes: Sequence[str], file: TextIO | None = None) -> None:
    """Print where a run has put its model for other programs, and what to know of it."""
    print_lines(_console(file), [f"Export:  {out}", *(f"         {note}" for note in notes)])


def _console(file: TextIO | None) -> Console:
    return Console(file=file or sys.stdout, highlight=False, emoji=False)


def print_lines(console: Console, lines: Iterable[str], style: str = "") -> None:
    """Print lines that the terminal itself wraps where they are longer than it is wide."""
    for line in lines:
        console.print(Text(line, style=style), soft_wrap=True)


@dataclass
class Ending:
    """What a command says where Ctrl-C ends it: what is there already."""

    there: str = ""


@contextmanager
def errors_end() -> Iterator[Ending]:
    """A command that cannot read or write something says so on standard error and ends with exit code 2.

    Ctrl-C ends it with 130 and one line: what is there already, as the command has put it into the `Ending`.
    """
    ending = Ending()
    try:
        yield ending
    except (OSError, ValueError) as error:
        print_lines(Console(stderr=True), [str(error)])
        sys.exit(2)
    except KeyboardInterrupt:
        print_lines(Console(stderr=True), ["; ".join(filter(None, ("interrupted", ending.there)))])
        sys.exit(130)


def _wrapped(texts: Iterable[str]) -> list[str]:
    return [line for text in texts for line in textwrap.wrap(text, WIDTH, break_on_hyphens=False)]


def show(table: Table, console: Console) -> list[str]:
    """Print a table, in several pieces where it would be wider than 80 columns. Returns its notes as lines."""
    pieces = fitted(table)
    printer = Console(file=console.file, highlight=False, emoji=False, width=max(WIDTH, *map(_width, pieces)))
    for i, piece in enumerate(pieces):
        printer.print(*([""] if i else []), rendered(piece), sep="\n")
    shown = {name for piece in pieces for name in piece.columns}
    return _wrapped(table.only(shown).notes)


def fitted(table: Table) -> list[Table]:
    """The table in 80 columns: without as many of its spare columns as must be, else in several tables."""
    for left_out in range(len(table.spare) + 1):
        narrow = table.only([name for name in table.columns if name not in table.spare[:left_out]])
        if _width(narrow) <= WIDTH:
            return [narrow]
    if not table.apart:
        return [narrow]
    pieces = fitted(replace(table, apart=()).only([name for name in table.columns if name not in table.apart]))
    names = list(table.columns[: table.left])  # of the rows, in each piece
    columns = names
    for name in (name for name in table.columns if name in table.apart):
        if columns != names and _width(table.only([*columns, name])) > WIDTH:
            pieces.append(table.only(columns))
            columns = names
        columns = [*columns, name]
    return [*pieces, table.only(columns)]


def _width(table: Table) -> int:
    """Characters that the table takes from left to right."""
    rows = [*table.head, *table.rows]
    widths = [
        max(max(map(len, _in_two_lines(name).split("\n"))), *(len(_cell(row[i])) for row in rows))
        for i, name in enumerate(table.columns)
    ]
    return sum(widths) + len(widths) - 1


def rendered(table: Table) -> rich.table.Table:
    """The table as rich draws it, the names of its columns in two lines."""
    drawn = rich.table.Table(box=RULES, padding=0, show_edge=False)
    for i, name in enumerate(table.columns):
        side: Literal["left", "right"] = "left" if i < table.left or name in WORDS else "right"
        heading = Text(_in_two_lines(name))
        drawn.add_column(heading, justify=side, no_wrap=name != "reason", overflow="fold")
    for row in table.head:
        drawn.add_row(*map(_cell, row))
    for i, row in enumerate(table.rows):
        if i in table.rules or (i == 0 and table.head):
            drawn.add_section()
        drawn.add_row(*map(_cell, row), style="bold" if i in table.strong else None)
    return drawn


def _in_two_lines(name: str) -> str:
    before, _, after = name.rpartition(" ")
    return visible(NAMES.get(name) or (f"{before}\n{after}" if before else name.replace("_", "_\n", 1)))


def _cell(entry: Entry) -> Text:
    return Text(visible(f"{entry.text} {entry.small}" if entry.small else entry.text), COLOURS.get(entry.kind, ""))


def fidelity_lines(fidelity: dict[str, Any]) -> list[str]:
    """How far predictions on a few fixed windows have moved from full precision."""
    rows, answers = fidelity["by_mask_ratio"], fidelity["answers"]
    steps = [step for step in answers["first_diverging_step"] if step is not None]
    first = [f"The first differs after step {min(steps)} of {answers['steps']}."] if steps else []
    return [
        "Against full precision     masked: " + " ".join(f"{100 * row['mask_ratio']:6.0f} %" for row in rows),
        "divergence, nats per masked token  " + " ".join(f"{short(float(row['divergence'])):>8}" for row in rows),
        "same token most probable           " + " ".join(f"{100 * row['agreement']:6.0f} %" for row in rows),
        f"Answers of {answers['tokens']} tokens: {100 * answers['agreement']:.0f} % of the tokens are the same, "
        f"{len(steps)} of {answers['documents']} answers differ.",
        *first,
        *step_lines(fidelity),
    ]


def step_lines(fidelity: dict[str, Any]) -> list[str]:
    """What the states of full precision show, on average over the steps looked at; nothing where none were."""
    flips = [row["commit_flips"] for row in fidelity.get("by_step", ()) if row["commit_flips"] is not None]
    if not flips:
        return []
    blocks = [[float(value) for value in block if value is not None] for block in fidelity["layers"]["sqnr_db"]]
    means = [fmean(values) for values in blocks if values]
    noise = f"; SQNR by block {means[0]:.0f} to {means[-1]:.0f} dB" if means else ""
    return [f"On full precision's states: {100 * fmean(flips):.0f} % other commits{noise}."]


def footer(record: Record, folder: str | Path | None, again: str | None) -> list[str]:
    """Notes, the memory taken, where the record lies, and how to run it again."""
    lines = [f"Note:    {text}" for text in record.warnings]
    if record.memory:
        ram, gpu = (record.memory["peak"][kind] / 1e9 for kind in ("ram", "gpu"))
        taken = f"at most {ram:.2f} GB of RAM" + (f", {gpu:.2f} GB of the GPU" if gpu else "")
        from_disk = "; quantized from disk, block by block" if record.quantization.get("from_disk") else ""
        lines.append(f"Memory:  {taken}{from_disk}")
    if folder is not None:
        lines.append(f"Record:  {folder}")
    if again or record.command:
        lines.append(f"Again:   {again or record.command}")
    return lines


def print_copy(record: Record, file: TextIO | None = None) -> None:
    """Print in one line what became of the copy in W&B; nothing where none was wanted."""
    mirror, line = record.mirror, None
    if mirror.get("state") == "written" and mirror.get("mode") == "offline":
        message = f", {mirror['message']}" if mirror.get("message") else ""
        line = f"offline{message}  (upload: wandb sync {mirror['folder']})"
    elif mirror.get("state") == "written":
        line = f"{mirror.get('mode')}, {mirror.get('url') or mirror.get('folder')}"
    elif mirror.get("state") == "failed":
        line = f"not written, {mirror.get('message')}; the record is complete without it"
    if line:
        print_lines(_console(file), [f"W&B:     {line}"])
