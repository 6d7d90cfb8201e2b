"""A run in flat numbers: what a table of runs, a search and Weights & Biases read."""

from __future__ import annotations

from typing import Any

from dqx.common.files import jsonable
from dqx.record.deltas import headline
from dqx.record.folder import Record

GB = 10**9
MEASURED = ("relative_drop", "level", "p_adjusted", "resolvable", "verdict")


def summary(record: Record) -> dict[str, Any]:
    """Flat numbers for W&B's table of runs: `delta/average`, `accuracy/nano_sums`, `average_bits` ..."""
    values: dict[str, Any] = {"average_bits": record.average_bits, "seconds": sum(record.timings.values())}
    values |= {f"seconds/{stage}": seconds for stage, seconds in record.timings.items()}
    values |= {f"memory/{kind}_gb": peak / GB for kind, peak in record.memory.get("peak", {}).items() if peak}
    for row in record.deltas:
        score = "nll" if row.lower_is_better else "accuracy"  # nats per token, or a fraction
        of_row: dict[str, Any] = {score: row.quantized, f"{score}_full_precision": row.full_precision}
        of_row |= {"delta": row.delta, "delta_low": row.low, "delta_high": row.high}
        of_row |= {key: getattr(row, key) for key in MEASURED}
        values |= {f"{key}/{row.name}": value for key, value in of_row.items()}
    for row in record.forwards:
        of_row = {"delta": row.delta, "full_precision": row.full_precision, "quantized": row.quantized}
        values |= {f"forwards_per_token/{key}/{row.name}": value for key, value in of_row.items()}
    first = headline(record.deltas)
    if not first.lower_is_better:  # of one task the average is that task: sweeps optimize it
        values.setdefault("delta/average", first.delta)
        values.setdefault("accuracy/average", first.quantized)
    for measured in record.fidelity.get("by_mask_ratio", ()):
        values |= {f"fidelity/{key}/{measured['mask_ratio']:g}": measured[key] for key in ("divergence", "agreement")}
    if "answers" in record.fidelity:
        values["fidelity/answers"] = record.fidelity["answers"]["agreement"]
    for side, stats in record.outliers.items():
        for site in stats.sites:
            values[f"outliers/{side}/{site}/abs_max"] = stats.worst(site).abs_max
            massive = sum(row.massive_values for row in stats.rows if row.site == site)
            values[f"outliers/{side}/{site}/massive_values"] = massive
    return jsonable({key: value for key, value in values.items() if value is not None})
