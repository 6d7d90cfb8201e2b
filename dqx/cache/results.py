"""Task results, of full precision and of quantized models: reused, continued where a run was killed, or computed.

Task by task, so that runs with different suites share the tasks they have in common, and none is lost later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dqx.cache.journal import Journal
from dqx.cache.keys import Key, task_facts
from dqx.cache.store import Store
from dqx.evaluate.results import TaskResult
from dqx.evaluate.settings import LikelihoodSettings
from dqx.evaluate.spec import TaskSpec
from dqx.processes import processes
from dqx.store import jsonable

Compute = Callable[[str, TaskSpec, Journal], TaskResult]


class Results:
    """The results of one model, whose `facts` are those of `keys.py`.

    `steps` is the run's own number of denoising steps, null the task's. Without `reuse` everything is computed afresh,
    and kept. With several processes the main one looks and decides.
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
        self.steps, self.likelihood, self.reuse = steps, likelihood or LikelihoodSettings(), reuse
        self.processes = processes()

    def key(self, name: str, spec: TaskSpec) -> Key:
        """What the result of a task depends on."""
        return Key("results", name, self.facts | {"task": task_facts(name, spec, self.steps, self.likelihood)})

    def get(self, name: str, spec: TaskSpec, compute: Compute) -> tuple[TaskResult, str]:
        """The task's result, and whether it was `reused` or `computed`.

        `compute` finds finished documents in the journal, and leaves them there.
        """
        key = self.key(name, spec)
        found = self._read(key)
        if found is None:
            with self._alone(key):
                found = self._read(key)  # by now another run may have computed it
                if found is None:
                    return self._compute(key, spec, compute), "computed"
        return found, "reused"

    def _read(self, key: Key) -> TaskResult | None:
        wanted = self.reuse and self.processes.main
        found: TaskResult | None = self.processes.broadcast(
            self.store.read(key, TaskResult.from_dict) if wanted else None
        )
        return found

    @contextmanager
    def _alone(self, key: Key) -> Iterator[None]:
        if not self.processes.main:  # waits for what the main process reads next
            yield
            return
        with self.store.lock(key):
            yield

    def _compute(self, key: Key, spec: TaskSpec, compute: Compute) -> TaskResult:
        journal = self.store.journal(key, self.processes.rank)
        if self.processes.main and not self.reuse:
            journal.remove()
        try:
            result = compute(key.name, spec, journal)
        finally:
            journal.close()
        if self.processes.main:
            self.store.write(key, result)
            journal.remove()
        return result
