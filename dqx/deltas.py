"""What quantization cost: differences paired by document, each with a 95 % interval and the study's level.

A delta is quantized minus full precision, a fraction. Scores between 0 and 1 get the adjusted Wald interval of
Bonett and Price 2012 (J. Educ. Behav. Stat. 37:479): two documents are added, one won and one lost. It covers at
least 93 % from 4 documents up (test_deltas.py counts it) and keeps a width when no document flips, where the
plain interval claims certainty. For scores that are not only 0 or 1 the same two documents are added, which is
wider than need be. Scores outside 0..1 get the paired t interval.

Averages over tasks combine the tasks' intervals by MOVER (Zou and Donner 2008, Stat. Med. 27:1693): the average of
the deltas, with the distances to the limits added in quadrature. Adding the variances around the adjusted
centres instead shrinks every task towards zero and misses the truth when many small tasks lose much.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist, fmean
from typing import Any

from dqx.evaluate.results import TaskResult

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)

#: The study's levels by relative drop: negligible below 1 %, moderate to 4 %, significant above.
MODERATE_FROM, SIGNIFICANT_ABOVE = 0.01, 0.04


@dataclass(frozen=True)
class Delta:
    """One row of the table: a task, the average of a category, or the average of everything."""

    name: str  # the task, the category, or "average"
    kind: str  # task, category or overall
    category: str | None
    metric: str | None
    n: int  # documents
    full_precision: float
    quantized: float
    delta: float  # quantized - full_precision
    low: float | None  # 95 % interval of delta; None where one document cannot give one
    high: float | None
    relative_drop: float | None  # (full_precision - quantized) / full_precision; None where full_precision is 0
    level: str | None  # negligible, moderate or significant, by the point estimate; None without a relative drop
    lost: int  # documents whose score fell
    gained: int  # documents whose score rose
    interval: str  # how low and high were made

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def level(relative_drop: float | None) -> str | None:
    """The study's level of a relative drop (0.02 is 2 %); a gain is negligible."""
    if relative_drop is None:
        return None
    drop = round(relative_drop, 9)  # (0.50 - 0.48) / 0.50 is 4 %, not a hair above
    if drop < MODERATE_FROM:
        return "negligible"
    return "moderate" if drop <= SIGNIFICANT_ABOVE else "significant"


def paired_interval(differences: list[float]) -> tuple[float, float]:
    """95 % interval for the mean of paired differences of scores between 0 and 1 (so each lies in -1..1).

    Bonett and Price 2012 where they are -1, 0 or 1. Raises ValueError without differences.
    """
    if not differences:
        raise ValueError("no document to compare")
    n = len(differences) + 2
    centre = math.fsum(differences) / n
    variance = (math.fsum(d * d for d in differences) + 2) / n - centre**2
    half = Z * math.sqrt(variance / n)
    return max(-1.0, centre - half), min(1.0, centre + half)


def t_interval(differences: list[float]) -> tuple[float, float] | None:
    """95 % t interval for the mean of paired differences of any size; None for a single one."""
    from scipy.stats import t

    n = len(differences)
    if n < 2:
        return None
    mean = math.fsum(differences) / n
    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    half = float(t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * deviation / math.sqrt(n)
    return mean - half, mean + half


def compare_task(full_precision: TaskResult, quantized: TaskResult) -> Delta:
    """The delta of one task over its documents, paired by `doc_id`.

    Raises ValueError, naming them, for documents that are in one result only, twice in one, or without a score.
    """
    name = full_precision.name
    before, after = _scores(full_precision, "full precision"), _scores(quantized, "quantized")
    if before.keys() != after.keys():
        alone = [
            ("full precision", sorted(before.keys() - after.keys())),
            ("quantized", sorted(after.keys() - before.keys())),
        ]
        told = "; ".join(f"{_some(ids)} only in the {side} run" for side, ids in alone if ids)
        raise ValueError(f"task {name}: documents cannot be paired: {told}; evaluate both with the same limit and data")
    if not before:
        raise ValueError(f"task {name}: no document to compare")
    differences = [after[doc] - before[doc] for doc in before]
    bounded = all(0 <= score <= 1 for score in (*before.values(), *after.values()))
    limits = paired_interval(differences) if bounded else t_interval(differences)
    return _row(
        name=name,
        kind="task",
        category=full_precision.category,
        metric=full_precision.metric,
        n=len(differences),
        full_precision=fmean(before.values()),
        quantized=fmean(after.values()),
        delta=fmean(differences),
        limits=limits,
        lost=sum(d < 0 for d in differences),
        gained=sum(d > 0 for d in differences),
        interval="bonett-price" if bounded else "paired t",
    )


def compare(full_precision: Mapping[str, TaskResult], quantized: Mapping[str, TaskResult]) -> list[Delta]:
    """Deltas per task, then the macro average of each category of several tasks, then the macro average of all.

    A single category, or a category of one task, gets no row of its own: it would repeat another. Raises
    ValueError where the two sides do not hold the same tasks and documents.
    """
    if full_precision.keys() != quantized.keys():
        raise ValueError(
            f"the two runs hold different tasks: full precision {sorted(full_precision)}, quantized {sorted(quantized)}"
        )
    if not full_precision:
        raise ValueError("no task to compare")
    rows = [compare_task(full_precision[name], quantized[name]) for name in full_precision]
    categories = list(dict.fromkeys(row.category for row in rows))
    averages = []
    if len(categories) > 1:
        for category in categories:
            members = [row for row in rows if row.category == category]
            if len(members) > 1:
                averages.append(macro_average(members, str(category), "category", category))
    if len(rows) > 1:
        averages.append(macro_average(rows, "average", "overall", None))
    return [*rows, *averages]


def macro_average(rows: list[Delta], name: str, kind: str, category: str | None) -> Delta:
    """The mean over tasks, every task counting the same whatever its size; its interval by MOVER."""
    delta = fmean(row.delta for row in rows)
    below = [row.delta - row.low for row in rows if row.low is not None]
    above = [row.high - row.delta for row in rows if row.high is not None]
    limits = None
    if len(below) == len(above) == len(rows):
        limits = delta - math.hypot(*below) / len(rows), delta + math.hypot(*above) / len(rows)
    return _row(
        name=name,
        kind=kind,
        category=category,
        metric=None,
        n=sum(row.n for row in rows),
        full_precision=fmean(row.full_precision for row in rows),
        quantized=fmean(row.quantized for row in rows),
        delta=delta,
        limits=limits,
        lost=sum(row.lost for row in rows),
        gained=sum(row.gained for row in rows),
        interval="mover",
    )


def _row(*, full_precision: float, quantized: float, limits: tuple[float, float] | None, **rest: Any) -> Delta:
    drop = (full_precision - quantized) / full_precision if full_precision else None
    low, high = limits or (None, None)
    return Delta(
        full_precision=full_precision,
        quantized=quantized,
        low=low,
        high=high,
        relative_drop=drop,
        level=level(drop),
        **rest,
    )


def _scores(result: TaskResult, side: str) -> dict[str, float]:
    scores: dict[str, float] = {}
    twice, unscored = [], []
    for row in result.documents:
        if row.doc_id in scores:
            twice.append(row.doc_id)
        if not math.isfinite(row.score):
            unscored.append(row.doc_id)
        scores[row.doc_id] = row.score
    if twice:
        raise ValueError(
            f"task {result.name}, {side} run: {_some(twice)} listed twice; every document needs its own id"
        )
    if unscored:
        raise ValueError(f"task {result.name}, {side} run: {_some(unscored)} without a finite score")
    return scores


def _some(ids: Iterable[str], at_most: int = 5) -> str:
    names = list(ids)
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return f"{len(names)} {'document' if len(names) == 1 else 'documents'} ({', '.join(names[:at_most])}{more})"
