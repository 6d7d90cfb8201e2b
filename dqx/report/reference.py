"""Published results to compare with, as data: `qdlm_tables.yaml` holds the five tables of arXiv 2508.14896."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

TABLES = Path(__file__).with_name("qdlm_tables.yaml")


@dataclass(frozen=True)
class PublishedCell:
    """One number of a published table; model, method, bits and task as in `conf/`."""

    table: int
    model: str
    method: str
    bits: str
    task: str
    accuracy: float  # percent


@cache
def published_cells() -> tuple[PublishedCell, ...]:
    """Every number printed in the tables, averages left out."""
    data = yaml.safe_load(TABLES.read_text(encoding="utf-8"))
    return tuple(
        PublishedCell(row["table"], row["model"], row["method"], row["bits"], task, value)
        for row in data["rows"]
        for group, tasks in data["columns"].items()
        for task, value in zip(tasks, row.get(group) or [None] * len(tasks), strict=True)
        if value is not None
    )
