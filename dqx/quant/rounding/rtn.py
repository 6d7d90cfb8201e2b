"""Round to nearest: every weight to the closest point of its group's grid. Needs no data.

O = outputs, I = inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dqx.formats.bits import WeightBits
from dqx.formats.chunks import row_slices
from dqx.formats.integers import Grid, wide
from dqx.formats.make import make_grid
from dqx.formats.weight import BoundClip, QuantizedWeight, consecutive_groups, group_ranges, group_width
from dqx.quant.protocols import Context, Part, Stats
from dqx.quant.rounding.levels import BinaryLevels, FittedLevels


@dataclass(frozen=True)
class RTN(Part):
    """Round to nearest."""

    include_zero: bool = True  # ranges hold zero, as in GPTQ; false: plain min ... max
    exact_absmax: bool = False  # symmetric grids: scale = absmax / (2^(b-1) - 1), as integer kernels have it
    levels: BinaryLevels | None = None  # fitted to each group; null: the grid of bits
    needs: ClassVar[frozenset[str]] = frozenset()
    stream: ClassVar[str] = "quantized"

    @property
    def one_by_one(self) -> bool:
        return self.levels is not None

    def grid(self, bits: WeightBits) -> Grid:
        if self.levels is not None:
            return self.levels.grid(bits)
        return make_grid(bits, include_zero=self.include_zero, exact_absmax=self.exact_absmax)

    def __call__(self, w_OI: Tensor, bits: WeightBits, stats: Stats, clip: BoundClip | None = None) -> QuantizedWeight:
        if self.levels is not None:
            return nearest_levels(w_OI, self.levels, self.grid(bits), bits.group_size)
        return rtn_round(w_OI, self.grid(bits), bits.group_size, clip)

    def problems(self, where: str, context: Context) -> list[str]:
        return [] if self.levels is None else self.levels.problems(f"{where}.levels", context)


def nearest_levels(w_OI: Tensor, levels: BinaryLevels, grid: Grid, group_size: int = -1) -> QuantizedWeight:
    """Codes of `w_OI` on the levels of each group, as if the inputs were uncorrelated and equally large."""
    w, group_index = wide(w_OI), consecutive_groups(w_OI.shape[1], group_size, w_OI.device)
    fitted = FittedLevels(levels, grid, w, torch.ones_like(w[0]), group_index)
    codes = torch.empty_like(w, dtype=torch.uint8)
    for g, columns in enumerate(torch.arange(w.shape[1], device=w.device).split(group_width(w.shape[1], group_size))):
        fitted.fit(g, w[:, columns], columns)
        codes[:, columns] = grid.codes(w[:, columns], fitted.at(columns), fitted.scale[g, :, :1]).to(torch.uint8)
    return fitted.rounded(codes)


def rtn_round(w_OI: Tensor, grid: Grid, group_size: int = -1, clip: BoundClip | None = None) -> QuantizedWeight:
    """Codes of `w_OI` on one grid per row and group of `group_size` inputs (-1: one group per row)."""
    group_index = consecutive_groups(w_OI.shape[1], group_size, w_OI.device)
    grid = grid.for_tensor(w_OI)
    lo, hi = group_ranges(w_OI, grid, group_size, clip)
    scale, zero_point = grid.from_ranges(lo, hi)
    codes = torch.empty_like(w_OI, dtype=torch.uint8)
    for rows in row_slices(len(w_OI), w_OI.shape[1], w_OI.device):
        w = w_OI[rows]
        if clip is not None and clip.clamps:
            w = torch.clamp(w, *(bound[rows][:, group_index].to(w.dtype) for bound in (lo, hi)))
        codes[rows] = grid.codes(w, scale[rows][:, group_index], zero_point[rows][:, group_index])
    return QuantizedWeight(codes, scale, zero_point, group_index, grid)
