"""Reuse what is there, compute what is not: each artefact once, however many runs want it at the same time.

With several processes in a run the main one looks, decides, holds the lock and keeps; all of them compute. The log says
what became of each artefact, so that it proves what was computed how often:

    computing results/nano_facts-0123...        the lock is held
    computed  results/nano_facts-0123...        it is on the disk (or a warning says why not)
    reused    results/nano_facts-0123...
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from torch import Tensor

from dqx.common.processes import processes
from dqx.study.cache.key import Key
from dqx.study.cache.store import Store

log = logging.getLogger(__name__)
T = TypeVar("T")


class ArtifactCache:
    """Artefacts of a store. Without `reuse` everything is computed afresh, and kept."""

    def __init__(self, store: Store, *, reuse: bool = True):
        self.store, self.reuse, self.processes = store, reuse, processes()

    def value(self, key: Key, parse: Callable[[Any], T], compute: Callable[[], T]) -> tuple[T, str]:
        """What JSON can hold and `parse` makes of it again, and whether it was `reused` or `computed`."""
        return self.get(key, lambda: self.store.read(key, parse), compute, lambda value: self.store.write(key, value))

    def tensors(self, key: Key, compute: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], str]:
        """Named tensors on the CPU, and whether they were `reused` or `computed`."""
        return self.get(
            key, lambda: self.store.read_tensors(key), compute, lambda made: self.store.write_tensors(key, made)
        )

    def tensors_later(self, key: Key, compute: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
        """What `tensors` gives, computed now where it is not there, else read when it is asked for."""
        made, source = self.get(
            key,
            lambda: {} if self.store.has_tensors(key) else None,
            compute,
            lambda made: self.store.write_tensors(key, made),
        )
        if source == "computed":
            return lambda: made
        return lambda: self._look(lambda: self.store.read_tensors(key)) or self.tensors(key, compute)[0]

    def get(
        self, key: Key, read: Callable[[], T | None], compute: Callable[[], T], keep: Callable[[T], object]
    ) -> tuple[T, str]:
        """What `read` gives, or else what `compute` gives and `keep` keeps."""
        kept = self._look(read)
        if kept is None:
            with self.alone(key):
                kept = self._look(read)  # by now another run may have computed it
                if kept is None:
                    self._say("computing", key)
                    value = compute()
                    if self.processes.main:
                        keep(value)
                    self._say("computed ", key)
                    return value, "computed"
        self._say("reused   ", key)
        return kept, "reused"

    def alone(self, key: Key) -> AbstractContextManager[None]:
        """The main process waits for the lock; the others wait for what it tells them next."""
        return self.store.lock(key) if self.processes.main else nullcontext()

    def reading(self, key: Key) -> AbstractContextManager[None]:
        """What the main process finds stays as it is meanwhile; other runs may read it too."""
        return self.store.reading(key) if self.processes.main else nullcontext()

    def _look(self, read: Callable[[], T | None]) -> T | None:
        kept: T | None = self.processes.broadcast(read() if self.reuse and self.processes.main else None)
        return kept

    def _say(self, what: str, key: Key) -> None:
        if self.processes.main:
            log.debug(f"  {what} {key.path}")
