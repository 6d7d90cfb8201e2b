"""The processes that share a run, one per GPU: which one this is, what they tell each other, who does what.

`accelerate launch --multi_gpu --num_processes N` starts them, on a machine without GPUs with ACCELERATE_USE_CPU=true in
the environment (`--cpu` would start a single one). A process alone is the main one, and nothing here waits.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import nn

#: How long a process waits for another one: the main one may wait for a run elsewhere that computes the same.
PATIENCE = timedelta(days=7)


def state() -> PartialState:
    """accelerate's view of this process; the first call connects it with the others."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


@dataclass(frozen=True)
class Processes:
    """This process among all of them. Every call has to be made by all, in the same order."""

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, by rank."""
        return list(gather_object([value])) if self.count > 1 else [value]

    def broadcast(self, value: Any) -> Any:
        """The main process's value."""
        return broadcast_object_list([value])[0] if self.count > 1 else value


def processes() -> Processes:
    """The processes of this run."""
    found = state()
    return Processes(found.process_index, found.num_processes)


@contextmanager
def main_first() -> Iterator[None]:
    """The main process does this before the others, which then find what it has fetched."""
    with state().main_process_first():
        yield


def one_model(model: nn.Module, digest: Callable[[nn.Module], str]) -> list[str]:
    """Make all processes go on with the main one's numbers, where theirs are others (rounding of their GPUs).

    `digest` tells models apart. Returns what a reader of the results should know. Raises RuntimeError where the models
    differ by more than the numbers in their parameters and buffers.
    """
    team = processes()
    if team.count == 1 or len(set(team.gather(digest(model)))) == 1:
        return []
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.copy_(broadcast(tensor.data))
    if len(set(team.gather(digest(model)))) > 1:
        raise RuntimeError("the processes of this run quantized the model differently; use one process")
    return ["the processes rounded differently while quantizing: all went on with the main one's model"]


def shares(work: Sequence[float], n: int) -> list[list[int]]:
    """Items, by index, for each of `n` processes: the longest first, each to the process with the least to do.

    A pure function of `work`; each share in rising order.
    """
    found: list[list[int]] = [[] for _ in range(n)]
    loads = [(0.0, rank) for rank in range(n)]
    for i in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        load, rank = heapq.heappop(loads)
        found[rank].append(i)
        heapq.heappush(loads, (load + work[i], rank))
    return [sorted(share) for share in found]
