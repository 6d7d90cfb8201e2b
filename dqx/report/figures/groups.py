"""What figures of many runs say in the same words: scores of a group of runs, and what was run.

Groups are those of reports (`dqx/report/gather.py`): runs that were evaluated in the same way; seeds make one cell,
whose interval is over documents.
"""

from __future__ import annotations

import math
from statistics import fmean

from dqx.evaluate.spec import NLL
from dqx.record.deltas import Delta
from dqx.record.words import many_runs
from dqx.report.gather import Row, RunGroup


def complete(group: RunGroup) -> list[Row]:
    """The rows whose average is over all tasks of the group: others cannot be compared with them."""
    return [row for row in group.rows if set(row.deltas) >= set(group.tasks)]


def left_out(group: RunGroup) -> str:
    """How many rows are not shown."""
    count = len(group.rows) - len(complete(group))
    return f" {count} {'setting' if count == 1 else 'settings'} without all tasks left out." if count else ""


def nats(group: RunGroup) -> bool:
    """Whether scores are nats per token, of which fewer are better; else they are shares."""
    return all(result.metric == NLL for result in group.full_precision.values())


def unit(group: RunGroup) -> float:
    """Factor from a score to the number shown."""
    return 1.0 if nats(group) else 100.0


def score(group: RunGroup) -> str:
    """The score's name with its unit."""
    average = "mean " if len(group.tasks) > 1 else ""
    return f"{average}nats per token" if nats(group) else f"{average}accuracy, %"


def full_precision(group: RunGroup) -> float:
    """The score of full precision, in the unit shown."""
    return unit(group) * fmean(group.full_precision[task].value for task in group.tasks)


def quantized(group: RunGroup, delta: Delta) -> tuple[float, float, float]:
    """A score and its interval, in the unit shown and within what a score can be; NaN without an interval."""
    low, high = (math.nan if x is None else delta.full_precision + x for x in (delta.low, delta.high))
    if nats(group):
        return delta.quantized, low, high
    return 100 * delta.quantized, 100 * max(0.0, low), 100 * min(1.0, high)


def what_ran(groups: list[RunGroup]) -> str:
    """Model, tasks, documents, steps, calibration and seeds of groups that differ in their steps alone, if at all."""
    documents = {task: result.n for task, result in groups[0].full_precision.items()}
    runs = [run.record.settings for group in groups for row in group.rows for run in row.cell.runs]
    return many_runs(groups[0].name, documents, runs)
