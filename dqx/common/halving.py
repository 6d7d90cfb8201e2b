"""Work on many rows, in batches that are halved where the memory of a device is too small for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from dqx.common import accelerator

T = TypeVar("T")


def in_batches(count: int, size: int, work: Callable[[range], T], device: torch.device) -> Iterator[T]:
    """`work` on the rows 0 to `count` - 1, in order: `size` of them at a time, fewer after running out of memory.

    What has failed is done again with half the rows, so `work` must leave nothing behind where it raises. Raises
    torch.OutOfMemoryError where a single row does not fit.
    """
    start = 0
    while start < count:
        rows = range(start, min(start + size, count))
        try:
            done = work(rows)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            size = len(rows) // 2
        else:
            yield done
            start = rows.stop
            continue
        accelerator.empty_cache(device)  # outside of the handler, which keeps what has failed alive
