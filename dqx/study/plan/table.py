"""A plan as tables: the runs, the tasks, and what the numbers stand on."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from textwrap import fill
from typing import TextIO

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dqx.report.terminal import RULES
from dqx.study.estimate.memory import gigabytes
from dqx.study.plan.runs import Cost, PlannedRun

ASSUMPTIONS = """
A block, and a step of the evaluation without blocks, are timed on random weights of the model's shapes, at the
lengths and batch sizes of the work. At an assumed speed only operations count: 2 x weights x tokens, and those of
attention. Lengths of prompts and answers are those of the data (dqx/study/estimate/sizes.py). Likelihoods need their
different states, as many as expected. Answers end where those in the data do, half way to the end of their block; at
most they take all steps. Adaptive draws need less than counted. Quantized models are taken to run like full
precision; rounding and rotating activations took 1.1 to 1.8 times as long on the bundled models. Calibration is 3
passes of the text per stream, Hessians, and 1.5 passes per candidate of a scale search; solving, clipping and
searching rotations are not counted. Full precision is counted in the first run that needs it, less the documents in
the cache; a quantized model is known by its tensors, so that results of it are found only once it is made.
"""
WIDTH = 118


def print_plan(runs: Sequence[PlannedRun], file: TextIO | None = None) -> None:
    """Print the runs, the tasks, what stands in their way, and what the estimate assumes."""
    file = file or sys.stdout
    console = Console(file=file, highlight=False, emoji=False)
    wide = Console(file=file, highlight=False, emoji=False, width=max(200, console.width))
    console.print(Text(f"\n{len(runs)} run{'s' if len(runs) != 1 else ''} planned, nothing is loaded or run\n"))
    counted = [run for run in runs if not run.problems]
    costs = _costs(counted)
    wide.print(_run_table(runs, costs))
    if any(run.work for run in counted):
        console.print()
        wide.print(_task_table(counted))
    console.print()
    for line in [*_total(counted, costs), *_notes(runs)]:
        console.print(Text(line), soft_wrap=True)
    console.print()
    console.print(Text(fill(ASSUMPTIONS.strip(), WIDTH)), soft_wrap=True)


def _costs(runs: Iterable[PlannedRun]) -> list[dict[str, Cost]]:
    """The parts of each run; a full-precision evaluation belongs to the first run that needs it."""
    found: list[dict[str, Cost]] = []
    computed: set[str] = set()
    for run in runs:
        found.append(run.cost(computed))
        computed |= set(run.baselines.values())
    return found


def _run_table(runs: Sequence[PlannedRun], costs: Sequence[dict[str, Cost]]) -> Table:
    table = Table(box=RULES, padding=0, show_edge=False)
    for name in ("model", "method", "bits"):
        table.add_column(name, no_wrap=True)
    for name in ("tasks", "FLOPs", "memory", "full\nprecision", "calibrate", "evaluate", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    left = iter(costs)
    for run in runs:
        names = (run.model, run.method, run.bits, str(len(run.tasks)))
        if run.problems:
            table.add_row(*names, *[""] * 5, "cannot run")
            continue
        parts = next(left)
        whole = sum(parts.values(), Cost())
        memory = "" if run.memory is None else gigabytes(run.memory.total)
        table.add_row(*names, amount(whole.flops), memory, *(duration(c.seconds) for c in (*parts.values(), whole)))
    if len(costs) > 1:
        columns = [sum((parts[name] for parts in costs), Cost()) for name in costs[0]]
        whole = sum(columns, Cost())
        table.add_section()
        table.add_row("all", "", "", "", amount(whole.flops), "", *(duration(c.seconds) for c in (*columns, whole)))
    return table


def _task_table(runs: Iterable[PlannedRun]) -> Table:
    table = Table(box=RULES, padding=0, show_edge=False)
    for name in ("model", "task"):
        table.add_column(name, no_wrap=True)
    for name in (
        "documents",
        "each",
        "forwards",
        "at most",
        "tokens\neach",
        "tokens",
        "FLOPs",
        "one\nevaluation",
        "in the\ncache",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    rows = {
        (run.model, name, work, _in_cache(run, name)): run.evaluation[name]
        for run in runs
        for name, work in run.work.items()
    }
    for (model, name, work, found), cost in rows.items():
        table.add_row(
            model,
            name,
            str(work.documents),
            work.each,
            amount(work.forwards),
            amount(work.at_most),
            str(work.length),
            amount(work.tokens),
            amount(cost.flops),
            duration(cost.seconds),
            found,
        )
    return table


def _in_cache(run: PlannedRun, task: str) -> str:
    done = run.found.get(task, 0)
    return "all" if done is None else str(done or "-")


def _total(runs: Sequence[PlannedRun], costs: Sequence[dict[str, Cost]]) -> list[str]:
    """How speeds were found, and what it comes to on the devices at hand."""
    lines = [f"Speed {speed}." for speed in dict.fromkeys(run.speed for run in runs)]
    if len(runs) > 1:
        seconds = [sum(parts.values(), Cost()).seconds for parts in costs]
        most = max(range(len(runs)), key=seconds.__getitem__)
        largest = f"{runs[most].model}-{runs[most].method}-{runs[most].bits}"
        lines.append(
            f"In all {duration(sum(seconds))} of one device; the largest run is {largest}, {duration(seconds[most])}."
        )
        gpus = torch.cuda.device_count()
        if gpus > 1:
            ideal = max(max(seconds), sum(seconds) / gpus)
            lines.append(f"On the {gpus} GPUs here, one run on each, {duration(ideal)} at the least.")
    return lines


def _notes(runs: Sequence[PlannedRun]) -> list[str]:
    by_problem: dict[str, list[str]] = {}
    by_note: dict[str, list[str]] = {}
    for run in runs:
        name = f"{run.model}-{run.method}-{run.bits}"
        for problem in run.problems:
            by_problem.setdefault(problem, []).append(name)
        for note in run.notes:
            by_note.setdefault(note, []).append(name)
    lines = [f"Cannot run: {', '.join(dict.fromkeys(names))}: {problem}" for problem, names in by_problem.items()]
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
