"""The bundled documents as lm-eval wants them: one dataset with a `test` split per task."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dqx.common.files import ASSETS

if TYPE_CHECKING:
    from datasets import DatasetDict

FOLDER = ASSETS / "nano"


def _documents(name: str) -> DatasetDict:
    from datasets import Dataset, DatasetDict  # a second: not for a task that is only judged

    lines = (FOLDER / f"{name}.jsonl").read_text().splitlines()
    return DatasetDict(test=Dataset.from_list([json.loads(line) for line in lines]))


def facts(**_: Any) -> DatasetDict:
    """`question`, `choices` and the index `answer` of the right one."""
    return _documents("facts")


def sums(**_: Any) -> DatasetDict:
    """`question`, `answer` (the final total) and the written-out `solution`."""
    return _documents("sums")


def code(**_: Any) -> DatasetDict:
    """`prompt`, `test` (assert statements), `entry_point` and `canonical_solution`."""
    return _documents("code")
