"""Histogram of |x| on a logarithmic scale: quantiles of any number of values in a fixed amount of memory.

A bin is the exponent of the float32 and the first `mantissa_bits` bits of its mantissa, read off its bit pattern: 2^m
bins per power of two. A quantile is the middle of the bin that holds the order statistic it stands for, so it is within
2^-(m+1) of it, relatively. Counts above a bin's lower edge are exact. Histograms of the same kind add up.

G groups of tokens, N tokens, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

EXPONENTS = 255  # powers of two of finite float32 numbers
MANTISSA = 23  # bits


def relative_error(mantissa_bits: int) -> float:
    """Of a bin's middle to anything in it."""
    return 2.0 ** -(mantissa_bits + 1)


class LogHistogram:
    """Counts [G, bins] of |x|, group by group."""

    def __init__(self, mantissa_bits: int, groups: int = 1, device: torch.device | str = "cpu"):
        self.mantissa_bits = mantissa_bits
        self.counts = torch.zeros(groups, EXPONENTS << mantissa_bits, dtype=torch.long, device=device)

    def add(self, size: Tensor, finite: Tensor | None = None, group: Tensor | None = None) -> None:
        """Count the values of size [N, ...], none below zero, those of row i in group[i] (0 without `group`).

        `finite`, of the same shape, says which ones count; without it all do.
        """
        index = self._bins(size)
        if group is not None:
            index = index + (group * self.counts.shape[1]).view(-1, *[1] * (size.dim() - 1)).to(index.dtype)
        index = index.flatten() if finite is None else index[finite]
        self.counts += torch.bincount(index, minlength=self.counts.numel()).view_as(self.counts)

    def quantiles(self, shares: Sequence[float], group: int = 0) -> list[float]:
        """Per share p the ceil(p n)-th smallest of n values; 0 where that is zero, NaN without values."""
        below = self.counts[group].cpu().cumsum(0)
        n = int(below[-1])
        if not n:
            return [math.nan for _ in shares]
        ranks = torch.tensor([max(1, math.ceil(share * n)) for share in shares])
        return [self._middle(index) for index in torch.searchsorted(below, ranks).tolist()]

    def bin_of(self, value: float) -> int:
        """The bin that holds a threshold. Never 0, the bin of exact zeros."""
        return max(1, int(self._bins(torch.tensor([min(value, torch.finfo(torch.float32).max)]))))

    def edge(self, index: int) -> float:
        """Lower edge of a bin."""
        pattern = torch.tensor([index << (MANTISSA - self.mantissa_bits)], dtype=torch.int32)
        return float(pattern.view(torch.float32))

    def count_from(self, index: int, group: int = 0) -> int:
        """How many values are at or above the lower edge of a bin."""
        return int(self.counts[group, index:].sum())

    def octaves(self, group: int = 0) -> dict[str, list[float]]:
        """Counts by powers of two, from the first to the last that holds anything; zeros are left out."""
        counts = self.counts[group].cpu().clone()
        counts[0] = 0
        by_octave = counts.view(EXPONENTS, -1).sum(1)
        used = by_octave.nonzero().flatten().tolist()
        if not used:
            return {"edges": [], "counts": []}
        first, last = used[0], used[-1]
        edges = [self.edge(i << self.mantissa_bits) for i in range(first, last + 1)]
        return {"edges": [*edges, edges[-1] * 2], "counts": [float(c) for c in by_octave[first : last + 1]]}

    def _bins(self, size: Tensor) -> Tensor:
        return size.contiguous().view(torch.int32) >> (MANTISSA - self.mantissa_bits)

    def _middle(self, index: int) -> float:
        """Bins of a power of two are equally wide, so relatively narrower from the first to the last."""
        per_octave = 1 << self.mantissa_bits
        return self.edge(index) * (1 + 0.5 / (per_octave + index % per_octave)) if index else 0.0
