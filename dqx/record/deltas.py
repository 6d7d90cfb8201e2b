"""What quantization cost: differences paired by document, with interval, test, resolution, verdict and level.

A delta is quantized minus full precision: a fraction, or nats per token for a text's negative log-likelihood, where
less is better. The methods are those of `dqx/record/significance.py`, chosen there by measured coverage.

Interval of a task. Scores between 0 and 1 get the adjusted Wald interval of Bonett and Price 2012 (J. Educ. Behav.
Stat. 37:479), which covers at least 93 % from 4 documents up (test_deltas.py counts it). The bootstrap over the same
documents covers no better, so the closed form is `low`, `high` and the bootstrap stands beside it; for scores that are
not only 0 or 1 both are wider than need be. Other scores get the studentised bootstrap, below 8 documents paired t.

Averages over tasks combine the tasks' intervals by MOVER (Zou and Donner 2008, Stat. Med. 27:1693): the average of
the deltas, with the distances to the limits added in quadrature. Adding the variances around the adjusted
centres instead shrinks every task towards zero and misses the truth when many small tasks lose much; so would
resampling the documents of all tasks together. A text's likelihood is no part of an average of accuracies.

Verdicts. Tasks are tested by exact McNemar, or by sign flips where a metric is more than 0 or 1, and p-values are
corrected by Holm over the run's tasks; category averages are a family of their own, and so is the overall average,
tested by flipping the signs of all its documents. A difference is called better or worse where the corrected p-value is
at most 5 % and the interval leaves out 0. An interval is not corrected: where it leaves out 0 and the verdict is
"not distinguishable", the two p-values, before and after the correction, show why.

Levels. The study sorts relative drops into three levels; here they are named by their limits and say nothing of chance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean
from typing import Any

from dqx.evaluate.results import DocumentRow, TaskResult
from dqx.evaluate.spec import FORWARDS, LOWER_IS_BETTER
from dqx.record import significance

Z = NormalDist().inv_cdf(0.5 + significance.CONFIDENCE / 2)

MEDIUM_FROM, LARGE_ABOVE = 0.01, 0.04
#: The study's levels by relative drop, which it calls negligible, moderate and significant.
LEVELS = SMALL, MEDIUM, LARGE = "< 1 %", "1-4 %", "> 4 %"


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
    relative_drop: float | None  # (full_precision - quantized) / full_precision; None where that is 0, and for texts
    level: str | None  # one of LEVELS, by the point estimate; None without a relative drop
    lost: int  # documents whose score got worse
    gained: int  # documents whose score got better
    interval: str  # how low and high were made
    bootstrap_low: float | None  # 95 % bootstrap interval of delta
    bootstrap_high: float | None
    p_value: float  # of no difference
    p_adjusted: float  # by Holm over the rows of the same kind
    resolvable: float | None  # the smallest difference such a sample finds four times in five, at 5 % without Holm
    verdict: str  # better, worse, or not distinguishable; by p_adjusted and the interval

    @property
    def lower_is_better(self) -> bool:
        return self.metric in LOWER_IS_BETTER


def paired(before: TaskResult, after: TaskResult) -> list[tuple[DocumentRow, DocumentRow]]:
    """The documents that both results have, in the order of the first."""
    other = {row.doc_id: row for row in after.documents}
    return [(row, other[row.doc_id]) for row in before.documents if row.doc_id in other]


def level(relative_drop: float | None) -> str | None:
    """The study's level of a relative drop (0.02 is 2 %); a gain has the lowest."""
    if relative_drop is None:
        return None
    drop = round(relative_drop, 9)  # (0.50 - 0.48) / 0.50 is 4 %, not a hair above
    if drop < MEDIUM_FROM:
        return SMALL
    return MEDIUM if drop <= LARGE_ABOVE else LARGE


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


def compare_task(full_precision: TaskResult, quantized: TaskResult) -> Delta:
    """The delta of one task over its documents, paired by `doc_id`.

    Raises ValueError, naming them, for documents that are in one result only, twice in one, or without a score.
    """
    before, after = _paired_scores(full_precision, quantized)
    differences = [b - a for a, b in zip(before, after, strict=True)]
    lower_is_better = full_precision.metric in LOWER_IS_BETTER
    fell, rose = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    limits: tuple[float, float] | None
    if not lower_is_better and all(0 <= score <= 1 for score in (*before, *after)):
        limits, interval = paired_interval(differences), "bonett-price"
        bootstrap: tuple[float, float] | None = significance.bootstrap_bounded(differences)
    else:
        limits = bootstrap = significance.bootstrap_studentised(differences)
        interval = "studentised bootstrap"
        if limits is None:
            limits, interval = significance.t_interval(differences), "paired t"
    decisions = not lower_is_better and all(d in (-1, 0, 1) for d in differences)
    return _row(
        name=full_precision.name,
        kind="task",
        category=full_precision.category,
        metric=full_precision.metric,
        n=len(differences),
        full_precision=fmean(before),
        quantized=fmean(after),
        delta=fmean(differences),
        limits=limits,
        bootstrap=bootstrap,
        lost=rose if lower_is_better else fell,
        gained=fell if lower_is_better else rose,
        interval=interval,
        p_value=significance.sign_flip(differences),
        resolvable=significance.resolvable_decision(len(differences), fell + rose)
        if decisions
        else significance.resolvable_mean(differences),
    )


def compare(full_precision: Mapping[str, TaskResult], quantized: Mapping[str, TaskResult]) -> list[Delta]:
    """Deltas per task, then the macro average of each category of several tasks, then the macro average of all.

    A single category, or a category of one task, gets no row of its own: it would repeat another. Averages are of
    accuracies alone. Raises ValueError where the two sides do not hold the same tasks and documents.
    """
    if full_precision.keys() != quantized.keys():
        raise ValueError(
            f"the two runs hold different tasks: full precision {sorted(full_precision)}, quantized {sorted(quantized)}"
        )
    if not full_precision:
        raise ValueError("no task to compare")
    rows = [compare_task(full_precision[name], quantized[name]) for name in full_precision]
    differences = {
        name: [b - a for a, b in zip(*_paired_scores(before, quantized[name]), strict=True)]
        for name, before in full_precision.items()
    }
    averaged = [row for row in rows if not row.lower_is_better]
    categories: dict[str | None, list[Delta]] = {}
    for row in averaged:
        categories.setdefault(row.category, []).append(row)
    several = {category: members for category, members in categories.items() if 1 < len(members) < len(averaged)}
    by_category = [macro_average(m, differences, str(name), "category", name) for name, m in several.items()]
    overall = [macro_average(averaged, differences, "average", "overall", None)] if len(averaged) > 1 else []
    return [row for family in (rows, by_category, overall) for row in judged(family)]


def forwards(full_precision: Mapping[str, TaskResult], quantized: Mapping[str, TaskResult]) -> list[Delta]:
    """Deltas of the sequences through the model per token written, of tasks whose sampler takes as many as the model's
    predictions ask for: quantization that costs no accuracy may still cost denoising steps."""
    rows = []
    for name, before in full_precision.items():
        paces = [pace(before), pace(quantized[name])]
        if all(result.documents for result in paces):
            rows.append(compare_task(*paces))
    return judged(rows)


def pace(result: TaskResult) -> TaskResult:
    """The result with forwards per token as the scores of its documents, of those that have them."""
    counted = ((row, row.forwards, row.tokens) for row in result.documents)
    rows = [replace(row, score=n / max(1, tokens or 0)) for row, n, tokens in counted if n is not None]
    return replace(result, metric=FORWARDS, documents=rows)


def headline(rows: Sequence[Delta]) -> Delta:
    """The row that stands for a run: the overall average, else its first task with an accuracy, else its first."""
    accuracies = [row for row in rows if not row.lower_is_better]
    return next((row for row in rows if row.kind == "overall"), (accuracies or rows)[0])


def macro_average(
    rows: list[Delta], differences: Mapping[str, list[float]], name: str, kind: str, category: str | None
) -> Delta:
    """The mean over tasks, every task counting the same whatever its size; its interval by MOVER.

    `differences` has those of the documents by task.
    """
    delta = fmean(row.delta for row in rows)
    resolvable = [row.resolvable for row in rows if row.resolvable is not None]
    return _row(
        name=name,
        kind=kind,
        category=category,
        metric=None,
        n=sum(row.n for row in rows),
        full_precision=fmean(row.full_precision for row in rows),
        quantized=fmean(row.quantized for row in rows),
        delta=delta,
        limits=mover([(row.delta, row.low, row.high) for row in rows]),
        bootstrap=mover([(row.delta, row.bootstrap_low, row.bootstrap_high) for row in rows]),
        lost=sum(row.lost for row in rows),
        gained=sum(row.gained for row in rows),
        interval="mover",
        p_value=significance.sign_flip([d / row.n for row in rows for d in differences[row.name]]),
        resolvable=math.hypot(*resolvable) / len(rows) if len(resolvable) == len(rows) else None,
    )


def mover(parts: Sequence[tuple[float, float | None, float | None]]) -> tuple[float, float] | None:
    """Limits of the mean of independent estimates (estimate, low, high); None where one of them has none."""
    mean = fmean(estimate for estimate, _, _ in parts)
    below = [estimate - low for estimate, low, _ in parts if low is not None]
    above = [high - estimate for estimate, _, high in parts if high is not None]
    if not len(below) == len(above) == len(parts):
        return None
    return mean - math.hypot(*below) / len(parts), mean + math.hypot(*above) / len(parts)


def judged(rows: Sequence[Delta]) -> list[Delta]:
    """The rows as one family: p-values corrected for each other, and verdicts by them."""
    adjusted = significance.holm([row.p_value for row in rows])
    return [replace(row, p_adjusted=p, verdict=verdict(row, p)) for row, p in zip(rows, adjusted, strict=True)]


def verdict(row: Delta, p_value: float) -> str:
    """The verdict on a row, for its p-value as corrected over a family."""
    return significance.verdict(row.delta, p_value, row.low, row.high, lower_is_better=row.lower_is_better)


def renewed(row: Delta) -> Delta:
    """A row of a record with level and verdict as this version of dqx gives them."""
    return replace(row, level=level(row.relative_drop), verdict=verdict(row, row.p_adjusted))


def _row(limits: tuple[float, float] | None, bootstrap: tuple[float, float] | None, **known: Any) -> Delta:
    """A row with what follows from its other numbers."""
    lower_is_better = known["metric"] in LOWER_IS_BETTER  # of texts already relative: the log of a perplexity ratio
    before, p_value = known["full_precision"], known["p_value"]
    drop = (before - known["quantized"]) / before if before and not lower_is_better else None
    low, high = limits or (None, None)
    bootstrap_low, bootstrap_high = bootstrap or (None, None)
    verdict = significance.verdict(known["delta"], p_value, low, high, lower_is_better=lower_is_better)
    return Delta(
        low=low, high=high, bootstrap_low=bootstrap_low, bootstrap_high=bootstrap_high, relative_drop=drop,
        level=level(drop), p_adjusted=p_value, verdict=verdict, **known,
    )  # fmt: skip


def _paired_scores(full_precision: TaskResult, quantized: TaskResult) -> tuple[list[float], list[float]]:
    """The scores of both sides, document by document."""
    name = full_precision.name
    before, after = _scores(full_precision, "full precision"), _scores(quantized, "quantized")
    if before.keys() != after.keys():
        alone = {"full precision": before.keys() - after.keys(), "quantized": after.keys() - before.keys()}
        told = "; ".join(f"{_some(sorted(ids))} only in the {side} run" for side, ids in alone.items() if ids)
        raise ValueError(f"task {name}: documents cannot be paired: {told}; evaluate both with the same limit and data")
    if not before:
        raise ValueError(f"task {name}: no document to compare")
    return list(before.values()), [after[doc] for doc in before]


def _scores(result: TaskResult, side: str) -> dict[str, float]:
    scores = {row.doc_id: row.score for row in result.documents}
    twice = [doc for doc, count in Counter(row.doc_id for row in result.documents).items() if count > 1]
    unscored = [doc for doc, score in scores.items() if not math.isfinite(score)]
    where = f"task {result.name}, {side} run"
    if twice:
        raise ValueError(f"{where}: {_some(twice)} listed twice; every document needs its own id")
    if unscored:
        raise ValueError(f"{where}: {_some(unscored)} without a finite score")
    return scores


def _some(names: Sequence[str], at_most: int = 5) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return f"{len(names)} {'document' if len(names) == 1 else 'documents'} ({', '.join(names[:at_most])}{more})"
