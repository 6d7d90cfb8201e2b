"""A run in flat numbers: what a table of runs, a search and Weights & Biases read."""

from __future__ import annotations

from typing import Any

from dqx.common.files import jsonable
from dqx.models.transformer import SITES
from dqx.record.deltas import headline
from dqx.record.folder import Record

GB = 10**9


def summary(record: Record) -> dict[str, Any]:
    """Flat numbers for W&B's table of runs: `delta/average`, `accuracy/nano_sums`, `average_bits` ..."""
    found: dict[str, Any] = {"average_bits": record.average_bits, "seconds": sum(record.timings.values())}
    found |= {f"seconds/{stage}": seconds for stage, seconds in record.timings.items()}
    found |= {f"memory/{kind}_gb": peak / GB for kind, peak in record.memory.get("peak", {}).items() if peak}
    for row in record.deltas:
        values: dict[str, Any] = {
            "accuracy": row.quantized,
            "accuracy_full_precision": row.full_precision,
            "delta": row.delta,
        }
        values |= {"delta_low": row.low, "delta_high": row.high, "relative_drop": row.relative_drop, "level": row.level}
        values |= {"p_adjusted": row.p_adjusted, "resolvable": row.resolvable, "verdict": row.verdict}
        if row.lower_is_better:  # nats per token
            values["nll"], values["nll_full_precision"] = values.pop("accuracy"), values.pop("accuracy_full_precision")
        found |= {f"{key}/{row.name}": value for key, value in values.items()}
    first = headline(record.deltas)
    if not first.lower_is_better:  # of one task the average is that task: sweeps optimize it
        found.setdefault("delta/average", first.delta)
        found.setdefault("accuracy/average", first.quantized)
    for measured in record.fidelity.get("by_mask_ratio", ()):
        found |= {f"fidelity/{key}/{measured['mask_ratio']:g}": measured[key] for key in ("divergence", "agreement")}
    if "answers" in record.fidelity:
        found["fidelity/answers"] = record.fidelity["answers"]["agreement"]
    for side, stats in record.outliers.items():
        for site in SITES:
            found[f"outliers/{side}/{site}/abs_max"] = stats.worst(site).abs_max
            found[f"outliers/{side}/{site}/massive_values"] = sum(
                r.massive_values for r in stats.rows if r.site == site
            )
    return jsonable({key: value for key, value in found.items() if value is not None})
