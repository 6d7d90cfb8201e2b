"""A rounded linear as a quantized checkpoint holds it: codes at their width, and the numbers of its grid.

O = outputs, I = inputs, G = groups per row, K = terms of a binary grid. Of a linear `q` the file has

    q.codes         uint8: the codes [O, I] of b bits, row after row without gaps (`packing.py`). Where groups of a
                    binary grid differ in their terms: the codes [O, inputs] of the groups with one term, of 1 bit each,
                    then those of the groups with two, and so on
    q.scale         [O, G], of binary grids [O, G, K], in the narrowest type that holds them to the bit, of E8M0,
                    float16, bfloat16 and their own. Those of nvfp4 in E4M3, as multiples of `q.grid.tensor_scale`.
                    Where groups differ in their terms: [O, terms of all groups]. Of GGUF's superblocks, of which there
                    are B per row, `q.scale.factor` [O, B] and `q.scale.integers`, packed like codes
    q.zero_point    [O, G], as integers of b bits packed like codes where they are such, else as scales are
    q.group_index   int16 [I]: the group of each input, where groups are not of neighbours
    q.column_scale  [I, 1 or K], of binary grids
    q.terms         uint8 [G], where groups differ in their terms

and its bias and what rounds its input, as the linear has them. `structure` in the file's header has the rest: the
shape, the grid, one zero point in place of equal ones, the inputs per group in place of groups of neighbours. The
weight is computed again from these, equal to the bit.

A weight that has other values than those of its grid cannot be computed again. Such a linear is stored as the model
holds it, and `quantized.json` names it, under `unpacked`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dqx.formats.binary import BinaryGrid
from dqx.formats.bits import ActivationBits, WeightBits
from dqx.formats.gguf import MinimumSuperblocks, SymmetricSuperblocks, levels
from dqx.formats.integers import Grid, bit_patterns
from dqx.formats.weight import QuantizedWeight, consecutive_groups
from dqx.quant.checkpoint.packing import BYTE, pack, packed_size, unpack
from dqx.quant.linear import QuantLinear
from dqx.quant.protocols import Quantizer
from dqx.quant.registry import storable

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
NARROW = (torch.float8_e8m0fnu, torch.float16, torch.bfloat16, torch.float32)
#: Why a linear is stored as it is.
UNPACKED = "not all of its weights are values of its grid, to the bit"


@storable
@dataclass(frozen=True, eq=False)
class TwoLevels:
    """Numbers [O, G] that are integers times a number of their superblock, as the file has them."""

    factor: Tensor  # [O, B]
    integers: Tensor
    bits: int  # of an integer
    groups: int  # per superblock

    @classmethod
    def restored(cls, **options: Any) -> Tensor:
        """The numbers, float32. Raises ValueError for another number of integers than there are groups."""
        self = cls(**options)
        integers = unpack(self.integers, self.bits, self.factor.numel() * self.groups)
        return (integers.view(*self.factor.shape, self.groups) * self.factor.float()[..., None]).flatten(1)


@storable
@dataclass(frozen=True, eq=False)
class PackedLinear:
    """What the file has of a `QuantLinear`."""

    codes: Tensor
    outputs: int
    inputs: int
    dtype: str  # of the weight
    grid: Grid
    grid_dtype: str  # of scales and zero points
    scale: Any  # Tensor, or TwoLevels, which becomes one when it is read
    zero_point: Any  # likewise, or one number
    group_index: Tensor | int
    column_scale: Tensor | None
    terms: Tensor | None
    bias: Tensor | None
    weight_bits: WeightBits
    activation: Quantizer | None
    activation_bits: ActivationBits

    @classmethod
    def restored(cls, **options: Any) -> QuantLinear:
        """The linear. Raises ValueError where what the file has does not belong together."""
        return cls(**options).unpacked()

    def unpacked(self) -> QuantLinear:
        """As `restored`."""
        if not isinstance(self.grid, Grid) or not 1 <= self.grid.bits <= BYTE:
            raise ValueError(f"its grid is {self.grid}, which has no codes of 1 to {BYTE} bits")
        groups = self.scale.shape[1] if self.terms is None else len(self.terms)
        group_I = self._group_index(groups)
        scale, zero_point = self._scale(groups), self._zero_point(groups)
        column_scale = None if self.column_scale is None else self.column_scale.to(scale.dtype)
        if column_scale is not None and column_scale.shape != (self.inputs, 1):
            _expect("column_scale", column_scale, self.inputs, *scale.shape[2:])
        rounded = QuantizedWeight(
            self._codes(group_I), scale, zero_point, group_I.long(), self.grid, column_scale=column_scale
        )
        return QuantLinear.restored(
            rounded.dequantize(_dtype(self.dtype)),
            self.bias,
            self.weight_bits,
            self.grid,
            self.activation,
            self.activation_bits,
            scale=scale,
            zero_point=zero_point,
            group_index=group_I,
            column_scale=column_scale,
        )

    def _group_index(self, groups: int) -> Tensor:
        """The group of each input [I], int32."""
        if isinstance(self.group_index, Tensor):
            group_I = self.group_index.int()
        else:
            group_I = consecutive_groups(self.inputs, self.group_index, self.codes.device).int()
        if group_I.shape != (self.inputs,) or group_I.min() < 0 or group_I.max() >= groups:
            raise ValueError(f"its group_index does not give each of {self.inputs} inputs one of {groups} groups")
        return group_I

    def _scale(self, groups: int) -> Tensor:
        """The scales [O, G] or [O, G, K]."""
        scale = self.scale.to(_dtype(self.grid_dtype))
        if self.scale.dtype == torch.float8_e4m3fn:
            scale = scale * self.grid.tensor_scale  # type: ignore[attr-defined]
        if self.terms is not None:
            _expect("terms", self.terms, groups)
            used = _used(self.terms, self.grid.bits)
            _expect("scale", scale, self.outputs, int(used.sum()))
            whole = scale.new_zeros(self.outputs, *used.shape)
            whole[:, used] = scale
            return whole
        terms = [self.grid.bits] if isinstance(self.grid, BinaryGrid) else []
        _expect("scale", scale, self.outputs, groups, *terms)
        return scale

    def _zero_point(self, groups: int) -> Tensor:
        """The zero points [O, G]."""
        dtype, shape = _dtype(self.grid_dtype), (self.outputs, groups)
        if not isinstance(self.zero_point, Tensor):
            return torch.full(shape, float(self.zero_point), dtype=dtype, device=self.codes.device)
        if self.zero_point.dtype == torch.uint8:
            return unpack(self.zero_point, self.grid.bits, self.outputs * groups).view(shape).to(dtype)
        _expect("zero_point", self.zero_point, *shape)
        return self.zero_point.to(dtype)

    def _codes(self, group_I: Tensor) -> Tensor:
        """The codes [O, I]."""
        if self.terms is None:
            return unpack(self.codes, self.grid.bits, self.outputs * self.inputs).view(self.outputs, self.inputs)
        codes = self.codes.new_zeros(self.outputs, self.inputs)
        columns = [self.terms[group_I] == terms for terms in range(1, self.grid.bits + 1)]
        sizes = [packed_size(self.outputs * int(of.sum()), terms) for terms, of in enumerate(columns, 1)]
        _expect("codes", self.codes, sum(sizes))
        for terms, (of, packed) in enumerate(zip(columns, self.codes.split(sizes), strict=True), 1):
            inputs = int(of.sum())
            codes[:, of] = unpack(packed, terms, self.outputs * inputs).view(self.outputs, inputs) << (
                self.grid.bits - terms
            )
        return codes


def packed(linear: QuantLinear) -> PackedLinear | None:
    """What to store of a linear with a grid; None where its weight cannot be computed from that."""
    assert linear.grid is not None
    assert linear.scale is not None
    assert linear.zero_point is not None
    assert linear.group_index is not None
    codes, bits = linear.exact_codes(), linear.grid.bits
    if codes is None or codes.max() >> bits:
        return None
    terms = _terms(linear.scale) if isinstance(linear.grid, BinaryGrid) else None
    return PackedLinear(
        codes=pack(codes, bits) if terms is None else _by_terms(codes, terms[linear.group_index], bits),
        outputs=linear.out_features,
        inputs=linear.in_features,
        dtype=_name(linear.weight),
        grid=linear.grid,
        grid_dtype=_name(linear.scale),
        scale=_stored_scale(linear.scale if terms is None else linear.scale[:, _used(terms, bits)], linear.grid),
        zero_point=_stored_zero_point(linear.zero_point, linear.grid),
        group_index=_stored_groups(linear.group_index),
        column_scale=None if linear.column_scale is None else _narrow(linear.column_scale),
        terms=terms,
        bias=linear.bias,
        weight_bits=linear.weight_bits,
        activation=linear.activation,
        activation_bits=linear.activation_bits,
    )


def _terms(scale_OGK: Tensor) -> Tensor | None:
    """How many terms each group has [G], uint8, the others' scales being zero; None where all have K."""
    used_GK = (bit_patterns(scale_OGK) != 0).any(0)
    places = torch.arange(1, used_GK.shape[1] + 1, dtype=torch.uint8, device=used_GK.device)
    terms_G = (used_GK * places).amax(1)
    return None if bool((terms_G == used_GK.shape[1]).all()) else terms_G


def _used(terms_G: Tensor, most: int) -> Tensor:
    """Which terms each group has [G, K], of `most`."""
    return torch.arange(most, device=terms_G.device) < terms_G[:, None]


def _by_terms(codes: Tensor, terms_I: Tensor, most: int) -> Tensor:
    """The codes of groups with one term, two, and so on; a term that a group lacks is the lowest bit of its codes."""
    parts = [pack(codes[:, terms_I == terms] >> (most - terms), terms) for terms in range(1, most + 1)]
    return torch.cat(parts)


def _stored_scale(scale: Tensor, grid: Grid) -> Tensor | TwoLevels:
    factor = getattr(grid, "tensor_scale", None)
    if factor is not None:
        multiples = (scale / factor).to(torch.float8_e4m3fn)
        if _same(multiples.to(scale.dtype) * factor, scale):
            return multiples
    return _two_levels(scale, grid) or _narrow(scale)


def _stored_zero_point(zero_point: Tensor, grid: Grid) -> Tensor | TwoLevels | float:
    first = zero_point.flatten()[0]
    if _same(first.expand_as(zero_point), zero_point):
        return first.item()
    whole = zero_point.to(torch.uint8)
    if _same(whole.to(zero_point.dtype), zero_point) and not whole.max() >> grid.bits:
        return pack(whole, grid.bits)
    return _two_levels(zero_point, grid, sign=-1) or _narrow(zero_point)


def _two_levels(x: Tensor, grid: Grid, sign: int = 1) -> TwoLevels | None:
    """Numbers [O, G] of this sign on two levels, where the grid has superblocks and they are such numbers."""
    if not isinstance(grid, MinimumSuperblocks | SymmetricSuperblocks):
        return None
    found = levels(x * sign, grid.groups, grid.largest)
    if found is None:
        return None
    bits = grid.largest.bit_length()
    packed = TwoLevels(_narrow(found[0] * sign), pack(found[1].to(torch.uint8), bits), bits, grid.groups)
    return packed if _same(TwoLevels.restored(**vars(packed)).to(x.dtype), x) else None


def _stored_groups(group_I: Tensor) -> Tensor | int:
    width = int((group_I == group_I[0]).sum())
    if torch.equal(group_I, consecutive_groups(len(group_I), width, group_I.device).int()):
        return width
    return group_I.to(torch.int16)


def _narrow(x: Tensor) -> Tensor:
    """x in the narrowest type that holds it to the bit."""
    narrowed = (x.to(dtype) for dtype in NARROW if dtype.itemsize < x.itemsize)
    return next((each for each in narrowed if _same(each.to(x.dtype), x)), x)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bit_patterns(a), bit_patterns(b))


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"{name} is no type of weights; there are {', '.join(DTYPES)}")
    return DTYPES[name]


def _expect(name: str, x: Tensor, *shape: int) -> None:
    if x.shape != shape:
        raise ValueError(f"its {name} has shape {tuple(x.shape)}, where {shape} is expected")
