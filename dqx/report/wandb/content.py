"""What of a record goes to W&B, as plain numbers and rows; their names are explained in README.md.

Nothing here needs W&B. The summary stays small however deep the model is and however many steps were watched: what
there is per block or step are tables and series.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from dqx.diagnostics.activations import OutlierStats
from dqx.evaluate.results import DocumentRow
from dqx.record.deltas import paired
from dqx.record.folder import Record

TAG_LENGTH = 64  # W&B takes no longer ones
DELTA_COLUMNS = (
    "name", "kind", "category", "metric", "n", "full_precision", "quantized", "delta", "low", "high",
    "relative_drop", "level", "lost", "gained", "bootstrap_low", "bootstrap_high", "p_value", "p_adjusted",
    "resolvable", "verdict",
)  # fmt: skip
DOCUMENT_COLUMNS = (
    "task", "doc_id", "outcome", "target", "full_precision", "quantized", "answer_full_precision", "answer_quantized",
    "score_full_precision", "score_quantized",
)  # fmt: skip
OUTLIER_COLUMNS = (
    "model", "block", "site", "abs_max", "median", "p99", "p999", "p9999", "kurtosis", "max_over_median",
    "outlier_channels", "massive_values", "massive_tokens", "massive_token_share", "relative_values",
    "relative_token_share", "top_channel", "top_sequence", "top_position", "top_token_id",
)  # fmt: skip
PART_COLUMNS = (
    "model", "block", "site", "token_class", "step", "mask_ratio", "tokens", "abs_max", "median", "p99", "p999",
    "kurtosis", "outlier_channels", "massive_values", "massive_tokens", "relative_values", "relative_tokens",
)  # fmt: skip
Table = tuple[tuple[str, ...], list[list[Any]]]  # columns, rows


def tags(record: Record) -> list[str]:
    """Words by which runs are found: model, method, bits, task, and what makes the sampler approximate."""
    run = record.settings
    tasks = [record.choices["task"]] if "task" in record.choices else list(record.full_precision)
    return [str(word)[:TAG_LENGTH] for word in (run.model, run.method_label, run.bits, *tasks, *run.approximations)]


def tables(record: Record, documents: int) -> dict[str, Table]:
    """Columns and rows of every table of which the record has something, `documents` of each task."""
    tables: dict[str, Table] = {
        "deltas": (DELTA_COLUMNS, [[getattr(row, column) for column in DELTA_COLUMNS] for row in record.deltas]),
        "documents": (DOCUMENT_COLUMNS, document_rows(record, documents)),
        "outliers": (OUTLIER_COLUMNS, outlier_rows(record)),
        "outliers_by_class": (PART_COLUMNS, list(_part_rows(record, by_step=False))),
        "outliers_by_step": (PART_COLUMNS, list(_part_rows(record, by_step=True))),
        "sqnr": (("block", "step", "mask_ratio", "sqnr_db"), list(_sqnr_rows(record))),
        "warnings": (("warning",), [[text] for text in record.warnings]),
    }
    for name in ("by_mask_ratio", "by_step"):
        rows = record.fidelity.get(name) or []
        columns = tuple(rows[0]) if rows else ()
        tables[f"fidelity_{name}"] = columns, [[_number(row[column]) for column in columns] for row in rows]
    return {name: (columns, [[*map(_cell, row)] for row in rows]) for name, (columns, rows) in tables.items() if rows}


def series(record: Record) -> dict[str, list[dict[str, Any]]]:
    """Axis -> what W&B can plot along it: rows `{axis: 3, "by_step/divergence": 0.1}`."""
    return {
        "denoising_step": _series(_along_steps(record), "denoising_step", "by_step"),
        "mask_ratio": _series(_along_mask_ratios(record), "mask_ratio", "by_mask_ratio"),
        "block": _series(_along_blocks(record), "block", "by_block"),
    }


def document_rows(record: Record, limit: int) -> list[list[Any]]:
    """The table of documents: of each task at most `limit`, those whose score changed first.

    Within the changed and the others the order is by a hash of the document's name, so that runs show the same ones.
    """
    rows = []
    for task, before in record.full_precision.items():
        pairs = paired(before, record.quantized[task])
        pairs.sort(key=lambda pair: (pair[0].score == pair[1].score, sha256(pair[0].doc_id.encode()).hexdigest()))
        sign = -1.0 if next(d for d in record.deltas if d.name == task).lower_is_better else 1.0
        rows += [_document_row(task, first, second, sign) for first, second in pairs[:limit]]
    return rows


def outlier_rows(record: Record) -> list[list[Any]]:
    """The outlier table: one row per model, block and site, by OUTLIER_COLUMNS."""
    rows = []
    for side, stats in record.outliers.items():
        for row in stats.rows:
            values = asdict(row) | {"model": side, "max_over_median": row.max_over_median}
            values |= {f"top_{key}": value for key, value in asdict(row.top_tokens[0]).items()}
            values["top_channel"] = row.top_channels[0].channel
            rows.append([values[column] for column in OUTLIER_COLUMNS])
    return rows


def histogram(stats: OutlierStats, site: str) -> tuple[list[float], list[float]]:
    """Counts and edges of log2 |x| at a site, all blocks together, a bin per power of two; zeros left out."""
    counts: dict[int, float] = {}
    for row in stats.rows:
        if row.site == site:
            for edge, count in zip(row.histogram["edges"], row.histogram["counts"], strict=False):
                exponent = round(math.log2(edge))
                counts[exponent] = counts.get(exponent, 0.0) + count
    if not counts:
        return [0.0], [0.0, 1.0]
    exponents = range(min(counts), max(counts) + 1)
    return [counts.get(e, 0.0) for e in exponents], [float(e) for e in (*exponents, exponents[-1] + 1)]


def shown(folder: Path) -> str:
    """Where the record lies, for other people's eyes: below the working folder or home, neither of them by name."""
    folder = folder.absolute()
    for root, name in ((Path.cwd(), ""), (Path.home(), "~")):
        if folder.is_relative_to(root):
            return str(Path(name, folder.relative_to(root)))
    return str(folder)


def _document_row(task: str, before: DocumentRow, after: DocumentRow, sign: float) -> list[Any]:
    change = sign * (after.score - before.score)
    outcome = "gained" if change > 0 else "lost" if change < 0 else "same"
    texts = [before.target, before.prediction, after.prediction, before.answer, after.answer]
    return [task, before.doc_id, outcome, *texts, before.score, after.score]


def _part_rows(record: Record, *, by_step: bool) -> Iterator[list[Any]]:
    for side, stats in record.outliers.items():
        for part in stats.parts:
            if (part.step is not None) == by_step:
                yield [side, *(getattr(part, column) for column in PART_COLUMNS[1:])]


def _sqnr_rows(record: Record) -> Iterator[list[Any]]:
    """Decibels of every block and step, None where the quantized model is exact."""
    layers = record.fidelity.get("layers") or {}
    for block, values in enumerate(layers.get("sqnr_db", ())):
        for step, mask_ratio, value in zip(layers["steps"], layers["mask_ratios"], values, strict=True):
            yield [block, step, mask_ratio, _number(value)]


Point = tuple[float, str, Any]  # where on the axis, name, value


def _along_steps(record: Record) -> Iterator[Point]:
    for row in record.fidelity.get("by_step") or ():
        for key in row.keys() - {"step", "positions"}:
            yield row["step"], key, _number(row[key])
    blocks = (record.fidelity.get("layers") or {}).get("sqnr_db") or ()
    for block, step, _, value in _sqnr_rows(record):
        if block == len(blocks) - 1:
            yield step, "sqnr_db", value
    for side, stats in record.outliers.items():
        worst: dict[tuple[int, str], float] = {}
        for part in stats.parts:
            if part.step is not None:
                at = part.step, part.site
                worst[at] = max(worst.get(at, 0.0), part.abs_max)
        for (step, site), value in worst.items():
            yield step, f"abs_max/{side}/{site}", value


def _along_mask_ratios(record: Record) -> Iterator[Point]:
    for row in record.fidelity.get("by_mask_ratio") or ():
        for key in row.keys() - {"mask_ratio", "positions"}:
            yield row["mask_ratio"], key, _number(row[key])


def _along_blocks(record: Record) -> Iterator[Point]:
    for side, stats in record.outliers.items():
        for row in stats.rows:
            yield row.block, f"abs_max/{side}/{row.site}", row.abs_max
            yield row.block, f"kurtosis/{side}/{row.site}", row.kurtosis
    values: dict[int, list[float]] = {}
    for block, _, _, value in _sqnr_rows(record):
        if value is not None:
            values.setdefault(block, []).append(value)
    for block, decibels in values.items():
        yield block, "sqnr_db", sum(decibels) / len(decibels)


def _series(points: Iterable[Point], axis: str, prefix: str) -> list[dict[str, Any]]:
    """One row per place on the axis, in its order; what is no finite number leaves a gap."""
    rows: dict[float, dict[str, Any]] = {}
    for place, name, value in points:
        if value is not None and math.isfinite(value):
            rows.setdefault(place, {axis: place})[f"{prefix}/{name}"] = value
    return [rows[place] for place in sorted(rows)]


def _number(value: float | str | None) -> float | None:
    """What `jsonable` may have made a string."""
    return float(value) if isinstance(value, str) else value


def _cell(value: Any) -> Any:
    """Table cells of one column need one type: what is no finite number is left empty."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
