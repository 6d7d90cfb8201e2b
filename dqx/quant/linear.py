"""A linear with a rounded weight and, where the method asks for it, a rounded input.

O = outputs, I = inputs, G = groups per row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqx.formats.bits import UNQUANTIZED, ActivationBits, WeightBits
from dqx.formats.chunks import row_slices
from dqx.formats.integers import Grid, bit_patterns
from dqx.formats.weight import QuantizedWeight, at_inputs
from dqx.quant.protocols import Quantizer
from dqx.quant.registry import storable

T = TypeVar("T")

#: The buffers that describe a linear's grid.
GRIDS = ("scale", "zero_point", "group_index", "column_scale")
#: How far from the nearest code another one may lie whose value the dtype makes the same: next to it, where codes rise
#: with their values; anywhere among the 16 of a binary grid, whose levels lie in any order.
STEPS = tuple(step for distance in range(1, 9) for step in (distance, -distance))
UNCODED = "this linear keeps its weight in 16 bit; there are no codes"


@storable
class QuantLinear(nn.Module):
    """Stands in for `nn.Linear`: activation quantizer, then a matmul with the fake-quantized weight.

    `weight` holds `scale * (codes - zero_point)` in the model's dtype, so the arithmetic is that of the model.
    Buffers `scale`, `zero_point` [O, G] and `group_index` [I] describe the grid (None at 16 bits); binary grids have a
    scale [O, G, K], and a `column_scale` [I, 1 or K] unless another linear took it over. Codes are not stored,
    `codes()` reads them off the weight.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    group_index: Tensor | None
    column_scale: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        weight_bits: WeightBits,
        rounded: QuantizedWeight | None = None,
        activation: Quantizer | None = None,
        activation_bits: ActivationBits | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight_bits = weight_bits
        self.grid: Grid | None = None if rounded is None else rounded.grid
        self.activation = activation
        self.activation_bits = activation_bits or ActivationBits()
        weight = linear.weight if rounded is None else rounded.dequantize(linear.weight.dtype)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", None if rounded is None else rounded.scale.clone())
        self.register_buffer("zero_point", None if rounded is None else rounded.zero_point.clone())
        self.register_buffer("group_index", None if rounded is None else rounded.group_index.to(torch.int32))
        column = None if rounded is None or rounded.column_scale is None else rounded.column_scale.clone()
        self.register_buffer("column_scale", column)

    @property
    def options(self) -> dict[str, Any]:
        """What `restored` needs to build this again."""
        names = ("weight", "bias", "weight_bits", "grid", "activation", "activation_bits")
        return {name: getattr(self, name) for name in (*names, *GRIDS)}

    @classmethod
    def restored(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        weight_bits: WeightBits,
        grid: Grid | None,
        activation: Quantizer | None,
        activation_bits: ActivationBits,
        **grids: Tensor | None,
    ) -> QuantLinear:
        """The linear with these `options`; `grids` are the buffers that describe its grid."""
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
        module = cls(linear, weight_bits, None, activation, activation_bits)
        module.grid = grid
        for name, tensor in grids.items():
            setattr(module, name, tensor)
        return module

    def quantize_input(self, x: Tensor) -> Tensor:
        """The input the matmul really sees."""
        if self.activation is None:
            return x
        quantizer, bits = self.activation, self.activation_bits
        return made_once(lambda x: quantizer(x, bits), x, quantizer, bits)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantize_input(x), self.weight, self.bias)

    def codes(self) -> Tensor:
        """Codes [O, I] as uint8, exact for float32 and float16 weights. bfloat16 rounds off less than half a step up to
        128 steps from zero: up to 7 bits always, and at 8 bits except in lopsided groups, where a code may be off by 1.
        Of a binary grid's levels, two that the dtype cannot tell apart are one.

        Raises ValueError where the weight is not quantized.
        """
        if self.grid is None:
            raise ValueError(UNCODED)
        return self.grid.codes(self.weight, *self._at_inputs()).to(torch.uint8)

    def exact_codes(self) -> Tensor | None:
        """Codes [O, I] as uint8 whose values, in the weight's dtype, are the weight to the bit.

        None where a weight is no value of its grid: something changed it afterwards, or the grid has more than 8 bits.
        Raises ValueError where the weight is not quantized.
        """
        if self.grid is None:
            raise ValueError(UNCODED)
        codes = torch.empty_like(self.weight, dtype=torch.uint8)
        for rows in row_slices(self.out_features, self.in_features, self.weight.device):
            found = _exact_codes(self.weight[rows], self.grid, *self._at_inputs(rows))
            if found is None:
                return None
            codes[rows] = found
        return codes

    def _at_inputs(self, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        assert self.scale is not None
        assert self.zero_point is not None
        assert self.group_index is not None
        return at_inputs(self.scale[rows], self.zero_point[rows], self.group_index.long(), self.column_scale)

    @torch.no_grad()
    def scale_outputs(self, factor_O: Tensor) -> None:
        """Multiply every output by a factor: the scales change, the codes stay. Factors must be positive."""
        codes = None if self.scale is None else self.codes()
        scale_outputs(self, factor_O)
        if codes is None or self.grid is None or self.scale is None:
            return
        self.scale = self.scale * factor_O.view(-1, *[1] * (self.scale.dim() - 1)).to(self.scale.dtype)
        weight = self.grid.dequantize(codes, *self._at_inputs())
        self.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)  # rounded to the dtype once

    def extra_repr(self) -> str:
        w, a = self.weight_bits, self.activation_bits
        bits = UNQUANTIZED if self.scale is None else w.bits
        return f"{self.in_features}, {self.out_features}, w{bits}a{a.bits}, group_size={w.group_size}"


def _exact_codes(weight: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor) -> Tensor | None:
    """`exact_codes` of rows [R, I], with the scale [R, I] or [R, I, K] and the zero point of every weight."""

    def patterns(codes: Tensor) -> Tensor:
        return bit_patterns(grid.dequantize(codes, scale, zero_point).to(weight.dtype))

    codes = grid.codes(weight, scale, zero_point).to(torch.uint8)
    missed = (patterns(codes) != bit_patterns(weight)).nonzero(as_tuple=True)
    if not len(missed[0]):
        return codes
    wanted, near, scale, zero_point = bit_patterns(weight[missed]), codes[missed], scale[missed], zero_point[missed]
    found, left = near.clone(), torch.ones_like(near, dtype=torch.bool)
    for step in STEPS:
        tried = ((near.int() + step) % 2**grid.bits).to(torch.uint8)
        same = patterns(tried) == wanted
        found, left = torch.where(same, tried, found), left & ~same
        if not left.any():
            codes[missed] = found
            return codes
    return None


def made_once(make: Callable[[Tensor], T], x: Tensor, *by: Any) -> T:
    """What `make` makes of x. It is kept at x, as long as that lives, for the next linear that reads it.

    `by` tells apart what makes it.
    """
    by = (*by, None if x.is_inference() else x._version)
    known, made = getattr(x, "_made", (None, None))
    if known != by:
        made = make(x)
        if made is not x:  # which would keep itself alive
            x._made = by, made  # type: ignore[attr-defined]
    return cast(T, made)


@torch.no_grad()
def scale_outputs(linear: nn.Linear | QuantLinear, factor_O: Tensor) -> None:
    """Multiply weight rows and bias of a linear; the old tensors, which others may hold, stay as they are."""
    factor = factor_O.to(torch.promote_types(torch.float32, linear.weight.dtype))
    dtype = linear.weight.dtype
    linear.weight = nn.Parameter((linear.weight.to(factor.dtype) * factor[:, None]).to(dtype), requires_grad=False)
    if linear.bias is not None:
        linear.bias = nn.Parameter((linear.bias.to(factor.dtype) * factor).to(dtype), requires_grad=False)
