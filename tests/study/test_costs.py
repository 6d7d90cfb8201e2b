"""What stages of a run take."""

from __future__ import annotations

import time

import pytest
import torch

from dqx.study.costs import Costs


def test_no_second_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts noted by themselves (loading) count there alone, and a stage that comes again adds to what it took."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    costs = Costs(torch.device("cpu"))
    for _ in range(2):
        with costs.stage("evaluate"):
            now += 5.0
            costs.seconds["load the model"] = costs.seconds.get("load the model", 0.0) + 2.0
    assert costs.seconds == {"load the model": 4.0, "evaluate": 6.0}
    assert sum(costs.seconds.values()) == now
