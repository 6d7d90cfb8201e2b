"""What was run, in the words that every figure of a run carries."""

from __future__ import annotations

from dqx.record.folder import Record
from dqx.record.words import whole_run as what_ran

__all__ = ["SITE_NAMES", "what_ran", "windows"]

#: Sites as people say them.
SITE_NAMES = {
    "attn_in": "input of q, k, v",
    "attn_out": "input of o",
    "mlp_in": "input of gate, up",
    "mlp_out": "input of down",
}


def windows(record: Record) -> str:
    """The text that outlier statistics were made on: `8 calibration windows of 256 tokens`."""
    stats = next(iter(record.outliers.values()))
    return f"{stats.sequences} calibration windows of {stats.tokens // stats.sequences} tokens"
