"""Which tokens of its sequences a forward computes, for what looks at all of them besides attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Of B sequences of T columns.

    real: [B, T], False at padding.
    columns: [B, W], those computed, all of them real; None: all T.
    statistics: what a forward of all columns found, [B, ...] by name, for those of some beside a cache that keeps it
        (`KVCache`); None: nothing is kept.
    """

    real: Tensor
    columns: Tensor | None = None
    statistics: dict[str, Tensor] | None = None

    @staticmethod
    def all_of(x: Tensor) -> Tokens:
        """For x [B, H, T, E], no column of which is padding."""
        return Tokens(torch.ones((len(x), x.shape[2]), dtype=torch.bool, device=x.device))

    def computed(self, x: Tensor) -> Tensor:
        """Of x [B, T], the columns computed [B, W]."""
        return x if self.columns is None else x.gather(1, self.columns)

    def statistic(self, name: str, find: Callable[[], Tensor]) -> Tensor:
        """What `find` gives in a forward of all columns; in one of some, what it gave in the one before them."""
        if self.columns is not None:
            assert self.statistics is not None
            return self.statistics[name]
        value = find()
        if self.statistics is not None:
            self.statistics[name] = value
        return value
