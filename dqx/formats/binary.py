"""Sums of signs as a grid: a weight is one of the 2^K sums `+-s_0 +-s_1 ... +-s_{K-1}`, without a zero point.

Binary-coding quantization: W = sum over k of s_k B_k, B_k a matrix of -1 and +1. For K = 2 the four levels of a row lie
at +-s_0 +-s_1, which need not be equally far from each other. How the scales are found is a part's choice
(`dqx.quant.rounding.levels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        return nearest(wide(x), scale.unbind(-1))

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """`sum over k of scale_k * B_k`, of codes [...] and scale [..., K]."""
        whole = codes.to(torch.int32)
        total = torch.zeros_like(scale[..., 0])
        for k in range(self.bits):
            plus = (whole >> (self.bits - 1 - k)) & 1
            total = total + scale[..., k] * (2 * plus - 1)
        return total


def nearest(x: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """`BinaryGrid.codes` of x [...], given the scales of every term, each of a shape that x's first dimensions have."""
    if x.dim() < 2:
        return _nearest(x, scales)
    codes = torch.empty_like(x)
    for rows in row_slices(len(x), x[0].numel() << len(scales), x.device):
        codes[rows] = _nearest(x[rows], [scale[rows] for scale in scales])
    return codes


def _nearest(x: Tensor, scales: Sequence[Tensor]) -> Tensor:
    levels = [-scales[0], scales[0]]
    for scale in scales[1:]:
        levels = [level for lower in levels for level in (lower - scale, lower + scale)]
    if x.device.type != "cpu":  # few kernels
        return (x[..., None] - torch.stack(levels, -1)).abs_().argmin(-1).to(x.dtype)
    codes, closer, least = torch.zeros_like(x), torch.empty_like(x), (x - levels[0]).abs_()
    for code, level in enumerate(levels[1:], 1):  # argmin along a dimension this short is several times slower
        distance = (x - level).abs_()
        torch.lt(distance, least, out=closer)  # as 0.0 and 1.0
        torch.maximum(codes, closer.mul_(code), out=codes)
        torch.minimum(least, distance, out=least)
    return codes


def terms_of(codes: Tensor, terms: int) -> list[Tensor]:
    """The matrices of -1 and +1 behind codes [...], term by term."""
    whole = codes.to(torch.uint8)
    return [((whole >> place) & 1).to(codes.dtype).mul_(2).sub_(1) for place in range(terms - 1, -1, -1)]
