"""A plan as tables: the runs, the tasks, and what the numbers stand on."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from textwrap import fill
from typing import TextIO

from rich.console import Console

from dqx.common import accelerator
from dqx.common.memory import gigabytes
from dqx.report.tables import Entry, Table
from dqx.report.terminal import WIDTH, print_lines, show
from dqx.study.estimate.gpus import GPUS
from dqx.study.plan.runs import Cost, PlannedRun

ASSUMPTIONS = """
A block, and a step of the evaluation without blocks, are timed on random weights of the model's shapes, at the
lengths and batch sizes of the work. At an assumed speed only operations count: 2 x weights x tokens, and those of
attention; with plan_gpu also reading the weights for each batch, and the shares of a card's peaks are a guess that
may be wrong by a factor of two (dqx/study/estimate/gpus.py). Lengths of prompts and answers are those of the data
(dqx/study/estimate/sizes.py). Likelihoods need their different states, as many as expected. Answers end where those
in the data do, half way to the end of their block; at most they take all steps. Adaptive draws need less than
counted. Quantized models are taken to run like full precision; rounding and rotating activations took 1.1 to 1.8
times as long on the bundled models. Calibration is 3 passes of the text per stream, Hessians, and 1.5 passes per
candidate of a scale search; solving, clipping and searching rotations are not counted. Full precision is counted in
the first run that needs it, less the documents in the cache; a quantized model is known by its tensors, so that
results of it are found only once it is made.
"""
LONG = 1000 * 3600.0  # seconds after which another machine is suggested


def print_plan(runs: Sequence[PlannedRun], file: TextIO | None = None) -> None:
    """Print the runs, the tasks, what stands in their way, and what the estimate assumes."""
    console = Console(file=file or sys.stdout, highlight=False, emoji=False)
    counted = [run for run in runs if not run.problems]
    costs = _costs(counted)
    print_lines(console, ("", f"{len(runs)} run{'s' if len(runs) != 1 else ''} planned, nothing is loaded or run", ""))
    show(_run_table(runs, costs), console)
    if any(run.work for run in counted):
        console.print()
        show(_task_table(counted), console)
    print_lines(
        console,
        ("", *_total(counted, costs), *_notes(runs), "", fill(ASSUMPTIONS.strip(), WIDTH, break_on_hyphens=False)),
    )


def _costs(runs: Iterable[PlannedRun]) -> list[dict[str, Cost]]:
    """The parts of each run; a full-precision evaluation belongs to the first run that needs it."""
    costs: list[dict[str, Cost]] = []
    computed: set[str] = set()
    for run in runs:
        costs.append(run.cost(computed))
        computed |= set(run.baselines.values())
    return costs


def _run_table(runs: Sequence[PlannedRun], costs: Sequence[dict[str, Cost]]) -> Table:
    columns = ("model", "method", "bits", "tasks", "FLOPs", "memory", "full precision", "calibrate", "evaluate")
    beside = any(run.here for run in runs)  # the seconds of this machine, beside those of another
    rows, left = [], iter(costs)
    for run in runs:
        cells = [run.model, run.method, run.bits, str(len(run.tasks))]
        if run.problems:
            rows.append([*cells, *[""] * 5, "cannot run", *[""] * beside])
        else:
            memory = "" if run.memory is None else gigabytes(run.memory.total)
            rows.append([*cells, *_cost_cells(list(next(left).values()), memory, beside)])
    if len(costs) > 1:
        sums = [sum((parts[name] for parts in costs), Cost()) for name in costs[0]]
        rows.append(["all", "", "", "", *_cost_cells(sums, "", beside)])
    names = (*columns, "total", *["total here"] * beside)
    return Table("Runs", names, _entries(rows), left=3, rules=(len(runs),), apart=columns[4:])


def _cost_cells(parts: Sequence[Cost], memory: str, beside: bool) -> list[str]:
    whole = sum(parts, Cost())
    cells = [amount(whole.flops), memory, *(duration(cost.seconds) for cost in (*parts, whole))]
    return [*cells, *[duration(whole.here)] * beside]


def _task_table(runs: Iterable[PlannedRun]) -> Table:
    columns = ("model", "task", "documents", "each", "forwards", "at most", "tokens each", "tokens", "FLOPs")
    costs = {
        (run.model, name, work, _in_cache(run, name)): run.evaluation[name]
        for run in runs
        for name, work in run.work.items()
    }
    rows = []
    for (model, name, work, in_cache), cost in costs.items():
        cells = [model, name, str(work.documents), work.each, amount(work.forwards), amount(work.at_most)]
        cells += [str(work.length), amount(work.tokens), amount(cost.flops), duration(cost.seconds), in_cache]
        rows.append(cells)
    names = (*columns, "one evaluation", "in the cache")
    return Table("Tasks", names, _entries(rows), left=2, apart=columns[3:])


def _entries(rows: Iterable[Iterable[str]]) -> list[list[Entry]]:
    return [[Entry(text) for text in row] for row in rows]


def _in_cache(run: PlannedRun, task: str) -> str:
    done = run.cached.get(task, 0)
    return "all" if done is None else str(done or "-")


def _total(runs: Sequence[PlannedRun], costs: Sequence[dict[str, Cost]]) -> list[str]:
    """How speeds were found, and what it comes to on the device that is planned for, and here."""
    lines = [f"Speed {speed}." for run in runs for speed in (run.speed, run.here) if speed]
    lines = list(dict.fromkeys(lines))
    wholes = [sum(parts.values(), Cost()) for parts in costs]
    whole, seconds = sum(wholes, Cost()), [cost.seconds for cost in wholes]
    elsewhere = any(run.elsewhere for run in runs)
    if len(runs) > 1:
        most = max(range(len(runs)), key=seconds.__getitem__)
        largest = f"the largest run is {runs[most].name}, {duration(seconds[most])}"
        here = f" ({duration(whole.here)} here)" if whole.here else ""
        lines.append(f"In all {duration(whole.seconds)} of one device{here}; {largest}.")
        gpus = accelerator.count()
        if gpus > 1 and not elsewhere:
            ideal = max(max(seconds), whole.seconds / gpus)
            lines.append(f"On the {gpus} GPUs here, one run on each, {duration(ideal)} at the least.")
    if whole.seconds > LONG and not elsewhere:
        lines.append(f"plan_gpu={next(iter(GPUS))} estimates the same on a GPU that is not here; so do {_others()}.")
    return lines


def _others() -> str:
    *names, last = list(GPUS)[1:]
    return f"{', '.join(names)} and {last}"


def _notes(runs: Sequence[PlannedRun]) -> list[str]:
    by_problem: dict[str, list[str]] = {}
    by_note: dict[str, list[str]] = {}
    for run in runs:
        for names, told in ((by_problem, run.problems), (by_note, run.notes)):
            for text in told:
                names.setdefault(text, []).append(run.name)
    lines = []
    for problem, whom in by_problem.items():
        whose = "all runs" if len(whom) == len(runs) > 1 else ", ".join(dict.fromkeys(whom))
        lines.append(f"Cannot run: {whose}: {problem}")
    unknown = dict.fromkeys(n for run in runs if not run.problems for n in run.tasks if n not in run.work)
    if unknown:
        lines.append(f"Not counted, for their sizes are not known: {', '.join(unknown)}.")
    return lines + [f"{_who(note, names, runs)}{note}" for note, names in by_note.items()]


def _who(note: str, names: Sequence[str], runs: Sequence[PlannedRun]) -> str:
    """Whom a note is about, where that is not all runs and the note does not name a model itself."""
    alone = len(names) == len(runs) or any(note.startswith(run.model) for run in runs)
    return "" if alone else f"{', '.join(dict.fromkeys(names))}: "


def amount(value: float) -> str:
    """A count with three digits: 950, 1.32k, 10.3M, 5.6P."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 999.5:
            return f"{value:.0f}{unit}" if not unit or value >= 100 else f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}E"


def duration(seconds: float) -> str:
    """Hours, minutes or seconds, whichever reads best."""
    if seconds <= 0:
        return "-"
    if seconds < 1:
        return "< 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours = seconds / 3600
    return f"{seconds / 60:.0f} min" if hours < 1.5 else f"{hours:.1f} h" if hours < 1000 else f"{hours:,.0f} h"
