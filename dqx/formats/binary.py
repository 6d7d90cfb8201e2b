"""Sums of signs as a grid: a weight is one of the 2^K sums `+-s_0 +-s_1 ... +-s_{K-1}`, without a zero point.

Binary-coding quantization: W = sum over k of s_k B_k, B_k a matrix of -1 and +1. For K = 2 the four levels of a row lie
at +-s_0 +-s_1, which need not be equally far from each other. How the scales are found is a part's choice
(`dqx.quant.rounding.levels`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from dqx.formats.chunks import row_slices
from dqx.formats.integers import Grid, wide


@dataclass(frozen=True)
class BinaryGrid(Grid):
    """`bits` terms. Scales have a last dimension more than those of other grids, the terms: [..., K].

    A code is the binary number of the signs, B_0 its highest bit, +1 a one. Zero points are 0 and mean nothing.
    """

    symmetric: bool = True

    def codes(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Codes of the levels nearest to x [...], of the lowest code among equally near ones; scale [..., K]."""
        x = wide(x)
        if x.dim() < 2:
            return self._nearest(x, scale)
        slices = row_slices(len(x), x[0].numel() << self.bits, x.device)
        return torch.cat([self._nearest(x[rows], scale[rows]) for rows in slices])

    def _nearest(self, x: Tensor, scale: Tensor) -> Tensor:
        levels = scale @ signs(self.bits, scale.dtype, scale.device).T
        return (x[..., None] - levels).abs_().argmin(-1).to(scale.dtype)

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """`sum over k of scale_k * B_k`, of codes [...] and scale [..., K]."""
        whole = codes.to(torch.int32)
        total = torch.zeros_like(scale[..., 0])
        for k in range(self.bits):
            plus = (whole >> (self.bits - 1 - k)) & 1
            total = total + scale[..., k] * (2 * plus - 1)
        return total


@cache
def signs(terms: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The signs behind every code [2^K, K]."""
    codes = torch.arange(2**terms, device=device)[:, None]
    places = torch.arange(terms - 1, -1, -1, device=device)
    return (2 * ((codes >> places) & 1) - 1).to(dtype)
