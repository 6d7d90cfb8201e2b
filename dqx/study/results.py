"""Task results, of full precision and of quantized models: reused, continued where a run was killed, or computed.

Task by task, so that runs with different suites share the tasks they have in common, and none is lost later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dqx.common.files import jsonable
from dqx.evaluate.journal import Journal
from dqx.evaluate.results import TaskResult
from dqx.evaluate.settings import LikelihoodSettings
from dqx.evaluate.spec import TaskSpec
from dqx.study.cache.key import Key
from dqx.study.cache.once import Once
from dqx.study.cache.store import Store
from dqx.study.facts import task_facts

Compute = Callable[[str, TaskSpec, Journal], TaskResult]


class Results:
    """The results of one model, whose `facts` are those of `keys.py`.

    `steps` is the run's own number of denoising steps, null the task's. Without `reuse` everything is computed afresh,
    and kept.
    """

    def __init__(
        self,
        store: Store,
        facts: Mapping[str, Any],
        *,
        steps: int | None = None,
        likelihood: LikelihoodSettings | None = None,
        reuse: bool = True,
    ):
        self.store, self.facts = store, jsonable(facts)
        self.steps, self.likelihood, self.once = steps, likelihood or LikelihoodSettings(), Once(store, reuse=reuse)

    def key(self, name: str, spec: TaskSpec) -> Key:
        """What the result of a task depends on."""
        return Key("results", name, self.facts | {"task": task_facts(name, spec, self.steps, self.likelihood)})

    def get(self, name: str, spec: TaskSpec, compute: Compute) -> tuple[TaskResult, str]:
        """The task's result, and whether it was `reused` or `computed`.

        `compute` finds finished documents in the journal, and leaves them there.
        """
        key = self.key(name, spec)
        return self.once.get(
            key,
            lambda: self.store.read(key, TaskResult.from_dict),
            lambda: self._compute(key, spec, compute),
            lambda result: self._keep(key, result),
        )

    def _compute(self, key: Key, spec: TaskSpec, compute: Compute) -> TaskResult:
        team = self.once.processes
        journal = self.store.journal(key, team.rank)
        if team.main and not self.once.reuse:
            journal.remove()
        try:
            return compute(key.name, spec, journal)
        finally:
            journal.close()

    def _keep(self, key: Key, result: TaskResult) -> None:
        self.store.write(key, result)
        self.store.journal(key).remove()
