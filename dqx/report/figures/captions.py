"""What was run, in the words that every figure of a run carries."""

from __future__ import annotations

from dqx.record.folder import Record
from dqx.report import header

#: Sites as people say them.
SITE_NAMES = {
    "attn_in": "input of q, k, v",
    "attn_out": "input of o",
    "mlp_in": "input of gate, up",
    "mlp_out": "input of down",
}


def what_ran(record: Record) -> str:
    """Model, method, bits, calibration, steps, seed and documents."""
    documents = sum(result.n for result in record.quantized.values())
    return ", ".join([*header(record), f"{documents} documents in all"])


def windows(record: Record) -> str:
    """The text that outlier statistics were made on: `8 calibration windows of 256 tokens`."""
    stats = next(iter(record.outliers.values()))
    return f"{stats.sequences} calibration windows of {stats.tokens // stats.sequences} tokens"
