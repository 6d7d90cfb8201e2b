"""Corrections: parameters added to a block so that what quantization shifted comes back on average.

I = channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from dqx.models.transformer import Block
from dqx.quant.protocols import Context, Part


@dataclass(frozen=True)
class MeanShift(Part):
    """Deviation-aware correction of D2Quant, arXiv:2602.02546: a bias at the post-attention norm.

    Once attention is quantized, the mean over calibration tokens of (full-precision - quantized) output of the norm
    before the MLP is added there. RMSNorm has no bias, so this is a new parameter, one vector per block. Everything
    after it (the rounding of gate and up included) sees corrected inputs.

    In channel j with mean mu and variance v of the difference, the mean square mu^2 + v falls to v on the calibration
    tokens: the expected reduction is mu^2 / (mu^2 + v). `shrink` multiplies mu by that share, which spares channels
    whose mean is small beside its scatter; the paper adds mu as it is.
    """

    shrink: bool = False  # multiply each channel's shift by its expected error reduction
    site: ClassVar[str] = "mlp_in"
    needs: ClassVar[frozenset[str]] = frozenset({"shift"})

    def apply(self, block: Block, stats: Mapping[str, Any], context: Context) -> None:
        if not isinstance(block.inputs[self.site], nn.Identity):
            raise ValueError("the mean shift is that of the norm's output, but a transform changes it at run time")
        norm = block.mlp_norm
        shift_I = mean_shift(stats["shift"], shrink=self.shrink).to(norm.weight)
        norm.bias = nn.Parameter(shift_I if norm.bias is None else norm.bias + shift_I, requires_grad=False)


def mean_shift(shift_2I: Tensor, *, shrink: bool = False) -> Tensor:
    """What to add to each channel [I], given mean and variance [2, I] of full-precision minus quantized values."""
    mean_I = shift_2I[0]
    return mean_I * expected_reduction(shift_2I) if shrink else mean_I


def expected_reduction(shift_2I: Tensor) -> Tensor:
    """Share of the mean square difference [I] that adding the mean removes: mu^2 / (mu^2 + v), 0 where both are 0."""
    mean_I, variance_I = shift_2I
    square_I = mean_I.square()
    return (square_I / (square_I + variance_I)).nan_to_num(0.0)
