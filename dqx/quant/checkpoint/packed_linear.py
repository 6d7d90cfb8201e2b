"""A rounded linear as a quantized checkpoint holds it: codes at their width, and the numbers of its grid.

O = outputs, I = inputs, G = groups per row, K = terms of a binary grid. Of a linear `q` the file has

    q.codes         uint8: the codes [O, I], row after row, of b bits each, without gaps (`packing.py`). Where groups of
                    a binary grid differ in their terms: first those of all inputs of groups with one term, of 1 bit
                    each, then those of two, and so on
    q.scale         [O, G], binary grids [O, G, K]; in the narrowest of E8M0, float16, bfloat16 and float32 that holds
                    them to the bit. Of nvfp4 in E4M3, relative to `q.grid.tensor_scale`, where that does. Where groups
                    differ in their terms [O, T], those of all terms of all groups in turn
    q.zero_point    likewise [O, G]; uint8, packed like codes, where all are integers of b bits; one number in
                    `structure` where all are the same
    q.group_index   int16 [I], the group of each input; one number in `structure`, the inputs per group, where
                    neighbours share one
    q.column_scale  [I, 1] or [I, K], where a binary grid has one
    q.terms         uint8 [G], where groups differ in their terms

and q.bias, and what quantizes its input, as the linear has them. The weight is computed again from these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqx.formats.bits import ActivationBits, WeightBits
from dqx.formats.integers import Grid, bit_patterns
from dqx.formats.weight import QuantizedWeight, consecutive_groups
from dqx.quant.checkpoint.packing import pack, packed_size, unpack
from dqx.quant.linear import QuantLinear
from dqx.quant.protocols import Quantizer
from dqx.quant.registry import storable

DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
NARROW = (torch.float8_e8m0fnu, torch.float16, torch.bfloat16, torch.float32)
UNPACKED = "not all of its weights are values of its grid to the bit"


@storable
@dataclass(frozen=True, eq=False)
class PackedLinear:
    """What the file has of a `QuantLinear`, which `restored` builds."""

    codes: Tensor
    outputs: int
    inputs: int
    dtype: str  # of the weight
    grid: Grid
    grid_dtype: str  # of scales and zero points
    scale: Tensor
    zero_point: Tensor | float
    group_index: Tensor | int
    column_scale: Tensor | None
    terms: Tensor | None
    bias: Tensor | None
    weight_bits: WeightBits
    activation: Quantizer | None
    activation_bits: ActivationBits

    @classmethod
    def restored(cls, **options: Any) -> QuantLinear:
        """The linear. Raises ValueError where the tensors do not belong together."""
        return cls(**options)._linear()

    def _linear(self) -> QuantLinear:
        dtype, grid_dtype = (_dtype(name) for name in (self.dtype, self.grid_dtype))
        groups = self._groups()
        scale, terms = self._scale(int(groups.max()) + 1)
    
