"""Which W&B run a record is: the same for a run that is started again, another for another run.

The id is a digest of what the numbers depend on, so that a finished run that comes from the cache a second time is no
second row of the project. `wandb.group=NAME` is part of it: whoever wants a run in two groups gets two. The group that
a sweep gives itself is not: a sweep that is started again takes its runs along. W&B runs that a sweep's agent started
have the agent's id (WANDB_RUN_ID).
"""

from __future__ import annotations

from typing import Any

from dqx.common.digest import digest
from dqx.common.files import jsonable
from dqx.config.schema import PLACES
from dqx.record.folder import Record

LENGTH = 16  # hexadecimal digits


def identity(record: Record) -> str:
    """The id of the record's W&B run."""
    environment, group = record.environment, record.settings.wandb.get("group")
    facts: dict[str, Any] = {
        "config": {key: value for key, value in record.config.items() if key not in PLACES},
        "group": group,
        "checkpoint": record.model.get("fingerprint"),
        "device": environment.get("device"),
        "code": environment.get("commit") or (environment.get("packages") or {}).get("dqx"),
    }
    return digest(jsonable(facts))[:LENGTH]
