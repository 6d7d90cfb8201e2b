"""What the results cache has already of a run: its full-precision side.

That depends on the checkpoint, of which the headers and some places are read, and on this machine. A quantized model is
known by every token of its calibration text, which a plan does not read: what is there of the other side is not told.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dqx.config.schema import Config
from dqx.evaluate.results import TaskResult
from dqx.models.checkpoint import Checkpoint
from dqx.study.cache.store import Store
from dqx.study.facts import evaluation_facts
from dqx.study.results import Results


def found_documents(
    config: Config, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> dict[str, int | None]:
    """By task, how many documents are finished, null for all of them. Tasks of which nothing is there are left out."""
    if not config.reuse or not Path(config.cache_dir).is_dir():
        return {}
    facts = evaluation_facts(
        checkpoint=checkpoint.folder,
        fingerprint=checkpoint.fingerprint(),
        model=config.model,
        dtype=dtype,
        device=device,
        seed=config.seed,
        limit=config.task.limit,
        data_root=config.data_root,
    )
    store = Store(config.cache_dir)
    results = Results(store, facts, steps=config.steps.count, likelihood=config.likelihood)
    found: dict[str, int | None] = {}
    for name, spec in config.task.suite.items():
        key = results.key(name, spec)
        if store.read(key, TaskResult.from_dict) is not None:
            found[name] = None
        elif done := len(store.journal(key).read().lines):
            found[name] = done
    return found
