"""Round to nearest: every weight to the closest point of its group's grid. Needs no data.

O = outputs, I = inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dqx.quant.bits import WeightBits
from dqx.quant.grid import Grid, QuantizedWeight, consecutive_groups, fit_groups


@dataclass(frozen=True)
class RTN:
    """Round to nearest."""

    include_zero: bool = True  # ranges hold zero, as in GPTQ; false: plain min ... max
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, w_OI: Tensor, bits: WeightBits, stats: Mapping[str, Tensor]) -> QuantizedWeight:
        return rtn_round(w_OI, Grid(bits.bits, bits.symmetric, self.include_zero), bits.group_size)

    def problems(self, where: str) -> list[str]:
        return []


def rtn_round(w_OI: Tensor, grid: Grid, group_size: int = -1) -> QuantizedWeight:
    """Codes of `w_OI` on one grid per row and group of `group_size` inputs (-1: one group per row)."""
    group_index = consecutive_groups(w_OI.shape[1], group_size, w_OI.device)
    scale, zero_point = fit_groups(w_OI, grid, group_size)
    codes = grid.codes(w_OI, scale[:, group_index], zero_point[:, group_index])
    return QuantizedWeight(codes.to(torch.uint8), scale, zero_point, group_index)
