"""A rounded weight: codes, scales and groups; which inputs share a scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dqx.formats.chunks import row_slices
from dqx.formats.integers import Grid, extremes


class BoundClip(Protocol):
    """A clip together with the statistics of one site: weights in groups in, the ranges to represent out.

    `w_OGW` [O, G, W] holds G groups of W inputs, `columns_GW` the input each column stands for; lo, hi [O, G, 1].
    With `clamps` the weights are clamped into their range before they are rounded.
    """

    @property
    def clamps(self) -> bool: ...

    def __call__(self, w_OGW: Tensor, grid: Grid, columns_GW: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class QuantizedWeight:
    """A rounded weight: what a quantized checkpoint has to store. Binary grids have K scales per group, others one."""

    codes: Tensor  # [O, I] uint8
    scale: Tensor  # [O, G] float, or [O, G, K]
    zero_point: Tensor  # [O, G] integers held as float
    group_index: Tensor  # [I] int64: the group of each input
    grid: Grid
    notes: tuple[str, ...] = ()  # what the rounding had to do differently than asked, in plain words
    column_scale: Tensor | None = None  # [I, 1 or K]: multiplies the scales of every input (binary grids)
    terms: tuple[int, ...] = ()  # of each group, where groups have more or fewer than others
    fold: bool = False  # the linear before is to take over the column scale [I, 1]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The fake-quantized weight [O, I], computed in the dtype of the scales; given in that one, or in `dtype`."""
        weight = torch.empty_like(self.codes, dtype=dtype or self.scale.dtype)
        for rows in row_slices(len(weight), weight.shape[1], weight.device):
            at = at_inputs(self.scale[rows], self.zero_point[rows], self.group_index, self.column_scale)
            weight[rows] = self.grid.dequantize(self.codes[rows], *at)
        return weight

    def folded(self) -> tuple[QuantizedWeight, Tensor]:
        """The weight without its column scale, and what the linear before is to multiply its outputs by [I].

        Their mean is 1, so that neither weight changes its size: what that takes out of them stays in the scales.
        """
        assert self.column_scale is not None
        column, mean = self.column_scale[:, 0], self.column_scale.mean()
        return replace(self, scale=self.scale * mean, column_scale=None, fold=False), column / mean

    def split(self, rows: list[int]) -> list[QuantizedWeight]:
        """Cut row-stacked weights apart again; `rows` are their output widths."""
        parts = zip(self.codes.split(rows), self.scale.split(rows), self.zero_point.split(rows), strict=True)
        return [replace(self, codes=c, scale=s, zero_point=z) for c, s, z in parts]


def at_inputs(
    scale: Tensor, zero_point: Tensor, group_index: Tensor, column_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The scales [O, I] or [O, I, K] and zero points [O, I] of every weight."""
    at = scale[:, group_index]
    return at if column_scale is None else at * column_scale, zero_point[:, group_index]


def group_width(n_inputs: int, group_size: int) -> int:
    """Inputs per group; -1 stands for all of them. Raises ValueError for 0 and other negative numbers."""
    if group_size == -1:
        return n_inputs
    if group_size < 1:
        raise ValueError(f"group_size={group_size} must be -1 (one group per row) or at least 1")
    return group_size


def consecutive_groups(n_inputs: int, group_size: int, device: torch.device | None = None) -> Tensor:
    """Group of each input [I] when neighbours share a group; the last group may be shorter."""
    return torch.arange(n_inputs, device=device) // group_width(n_inputs, group_size)


def group_ranges(w_OI: Tensor, grid: Grid, group_size: int, clip: BoundClip | None = None) -> tuple[Tensor, Tensor]:
    """The range lo, hi [O, G] of every group of consecutive inputs."""
    n_out, n_in = w_OI.shape
    width, bounds = group_width(n_in, group_size), []
    whole = n_in - n_in % width
    for first, last in ((0, whole), (whole, n_in)):
        if last > first:
            columns_GW = torch.arange(first, last, device=w_OI.device).view(-1, min(width, last - first))
            bounds.append(ranges(w_OI[:, first:last].reshape(n_out, *columns_GW.shape), grid, clip, columns_GW))
    lows, highs = zip(*bounds, strict=True)
    return torch.cat(lows, 1).squeeze(-1), torch.cat(highs, 1).squeeze(-1)


def ranges(w_OGW: Tensor, grid: Grid, clip: BoundClip | None, columns_GW: Tensor) -> tuple[Tensor, Tensor]:
    """The range lo, hi [O, G, 1] of every group: min and max, or what the clip says."""
    return extremes(w_OGW) if clip is None else clip(w_OGW, grid, columns_GW)
