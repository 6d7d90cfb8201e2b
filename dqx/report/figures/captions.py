"""What was run, in the words that every figure of a run carries."""

from __future__ import annotations

from dqx.record.folder import Record
from dqx.record.words import whole_run as what_ran

__all__ = ["site_name", "sites_of", "what_ran", "windows"]

#: Sites of a dense transformer as people say them.
SITE_NAMES = {
    "attn_in": "input of q, k, v",
    "attn_out": "input of o",
    "mlp_in": "input of gate, up",
    "mlp_out": "input of down",
}


def site_name(site: str) -> str:
    """A site in words."""
    return SITE_NAMES.get(site, f"input at {site}")


def sites_of(record: Record) -> list[str]:
    """The sites that the record's statistics and tensors are of, in their order."""
    measured = [site for stats in record.outliers.values() for site in stats.sites]
    return list(dict.fromkeys([*measured, *(name.split("/")[2] for name in record.activations)]))


def windows(record: Record) -> str:
    """The text that outlier statistics were made on: `8 calibration windows of 256 tokens`."""
    stats = next(iter(record.outliers.values()))
    return f"{stats.sequences} calibration windows of {stats.tokens // stats.sequences} tokens"
