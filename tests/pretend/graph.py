"""A graph without CUDA: the operations of some work, repeated on the same tensors and without the code that asked.

What CUDA would not record is refused: reads of device memory, tensors that come from the CPU. What it would record
and repeat wrongly (a number of Python's that should have changed) comes out wrong here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dqx.common import accelerator
from pretend.device import Refused, on_device, waits


class Recorder(TorchDispatchMode):
    """Notes the operations that are done inside."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        foreign = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not on_device(x)]
        if foreign or waits(op.overloadpacket, args, kwargs):
            raise Refused(f"{op} cannot be part of a graph: the host would wait, or memory of the CPU be read")
        result = op(*args, **kwargs)
        self.tape.append((op, args, kwargs, result))
        return result

    def replay(self) -> None:
        for op, args, kwargs, result in self.tape:
            made = op(*args, **kwargs)
            if any(returned.alias_info is None for returned in op._schema.returns):  # neither views nor in place
                for old, new in zip(tree_leaves(result), tree_leaves(made), strict=True):
                    old.copy_(new)


def recorder() -> tuple[Callable[[accelerator.Work], accelerator.Work], list[int]]:
    """What makes graphs (`accelerator.RECORDERS`), and how often each was replayed."""
    replays: list[int] = []

    def record(work: accelerator.Work) -> accelerator.Work:
        with Recorder() as tape:
            work()
        mine = len(replays)
        replays.append(0)

        def replay() -> None:
            if replays[mine]:  # recording has done it once; a graph of CUDA's would not have
                tape.replay()
            replays[mine] += 1

        return replay

    return record, replays
