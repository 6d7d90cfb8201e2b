"""The processes that share a run, one per GPU: which one this is, what they tell each other, who does what.

accelerate starts them (`dqx/launch/workers/`), on a machine without GPUs with ACCELERATE_USE_CPU=true in the
environment. A process alone is the main one, and nothing here waits.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # where nothing is computed neither is imported: two seconds
    from accelerate import PartialState
    from torch import nn

#: How long a process waits for another one: the main one may wait for a run elsewhere that computes the same.
PATIENCE = timedelta(days=7)


def state() -> PartialState:
    """accelerate's view of this process; the first call connects it with the others."""
    from accelerate import PartialState

    return PartialState(cpu=on_cpu(), timeout=PATIENCE)


def on_cpu() -> bool:
    """Whether the processes run without an accelerator: there is none, or accelerate was told to leave it alone."""
    from accelerate.utils import parse_flag_from_env

    from dqx.common import accelerator

    return accelerator.kind() is None or parse_flag_from_env("ACCELERATE_USE_CPU")


class Lost(RuntimeError):
    """Another process of this run is gone, and with it what this one was to hear from it."""


@contextmanager
def together() -> Iterator[None]:
    """For what all processes do at once. Raises Lost where one of them is no longer there."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo's and NCCL's
        raise Lost(f"another process of this run is gone ({error})") from error


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
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        with together():
            return list(gather_object([value]))

    def broadcast(self, value: Any) -> Any:
        """The main process's value."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        with together():
            return broadcast_object_list([value])[0]

    def wait(self) -> None:
        """Until all have come here."""
        with together():
            state().wait_for_everyone()


def processes() -> Processes:
    """The processes of this run."""
    own = state()
    return Processes(own.process_index, own.num_processes)


@contextmanager
def main_first() -> Iterator[None]:
    """The main process does this before the others, which then find what it has fetched."""
    team = processes()
    if not team.main:
        team.wait()
    yield
    if team.main:
        team.wait()


def one_model(model: nn.Module, digest: Callable[[nn.Module], str]) -> list[str]:
    """Make all processes go on with the main one's numbers, where theirs are others (rounding of their GPUs).

    `digest` tells models apart. Returns what a reader of the results should know. Raises RuntimeError where the models
    differ by more than the numbers in their parameters and buffers.
    """
    team = processes()
    if team.count == 1 or len(set(team.gather(digest(model)))) == 1:
        return []
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.copy_(team.broadcast(tensor.data.cpu() if team.main else None))
    if len(set(team.gather(digest(model)))) > 1:
        raise RuntimeError("the processes of this run quantized the model differently; use one process")
    return ["the processes rounded differently while quantizing: all went on with the main one's model"]


def shares(work: Sequence[float], n: int) -> list[list[int]]:
    """Items, by index, for each of `n` processes: the longest first, each to the process with the least to do.

    A pure function of `work`; each share in rising order.
    """
    taken: list[list[int]] = [[] for _ in range(n)]
    loads = [(0.0, rank) for rank in range(n)]
    for i in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        load, rank = heapq.heappop(loads)
        taken[rank].append(i)
        heapq.heappush(loads, (load + work[i], rank))
    return [sorted(share) for share in taken]
