"""Planning many runs: a line on the terminal says which, and for which task this machine is being timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from tqdm import tqdm

if TYPE_CHECKING:
    from dqx.study.plan.runs import PlannedRun

LINE = "planning, {n} of {total} runs done{desc} ({elapsed})"


def plan_runs(configs: Sequence[DictConfig]) -> list[PlannedRun]:
    """Every composed configuration as `plan_run` has it."""
    with tqdm(total=len(configs), bar_format=LINE, desc="", leave=False, disable=None) as bar:
        from dqx.study.plan.runs import plan_run  # torch: seconds, in which the line is there already

        runs = []
        for config in configs:
            runs.append(plan_run(config, lambda what: bar.set_description_str(f": {what}")))
            bar.update()
    return runs
