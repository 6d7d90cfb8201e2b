"""A rounded linear as blocks of a GGUF type: the type that its grid asks for, and its bytes.

O = outputs, I = inputs, G = groups per row, B = blocks per row, S = sub-blocks of a block.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dqx.export.gguf.blocks import TYPES, BlockType, Bytes
from dqx.formats.bits import WEIGHT_FORMATS
from dqx.formats.gguf import MinimumGrid, levels
from dqx.formats.integers import Grid
from dqx.quant.linear import QuantLinear

PRESETS = "write bits=gguf_q4_0 (gguf_q2_k, q3_k, q4_k, q6_k, q4_1, q5_0, q5_1, q8_0)"
#: Width -> the types of integers with one scale per group, symmetric and not.
OF_INTEGERS = {(8, True): "Q8_0", (6, True): "Q6_K", (5, True): "Q5_0", (4, True): "Q4_0"}
OF_ZERO_POINTS = {4: ("Q4_K", "Q4_1"), 5: ("Q5_1",), 2: ("Q2_K",)}


class Unfit(Exception):
    """Why no type holds a linear, and what to use instead."""


def block_type(linear: QuantLinear) -> BlockType:
    """The type that holds a rounded linear to the bit. Raises Unfit."""
    scale, index = linear.scale, linear.group_index
    assert scale is not None
    assert index is not None
    bits = linear.weight_bits
    if linear.column_scale is not None or scale.dim() != 2:
        raise Unfit("levels that are no even grid (binary terms, column scales); use method=rtn, gptq, gptaq or awq")
    width, rest = divmod(linear.in_features, scale.shape[1])
    if bits.format == "int" and (rest or width % 32):
        size = f"groups of {bits.group_size} do not divide {linear.in_features} inputs into blocks of 32"
        raise Unfit(f"{size}; set bits.weight.group_size to a multiple of 32 that divides the inputs")
    if not torch.equal(index.long(), torch.arange(len(index), device=index.device) // width):
        raise Unfit("groups of scattered inputs (act_order); set method.rounding.static_groups=true")
    kind = _of_grid(linear, width)
    for what, numbers in _numbers(linear, kind).items():
        if kind.subblocks is None and not _halves(numbers):
            one = "bits.weight.scale_dtype=float16" if what == "scales" else "bits.weight.group_size=256 at 4 bits"
            raise Unfit(f"{what} that float16 does not have; {PRESETS}, or {one}")
        if kind.subblocks is not None and levels(numbers, kind.subblocks, kind.largest) is None:
            raise Unfit(f"{what} of {kind.width} inputs that are no integers times one number of float16; {PRESETS}")
    return kind


def _of_grid(linear: QuantLinear, width: int) -> BlockType:
    """The type by format, width and group width alone. Raises Unfit."""
    grid, bits = linear.grid, linear.weight_bits
    assert grid is not None
    assert linear.zero_point is not None
    if bits.format in WEIGHT_FORMATS:
        return TYPES[bits.format.upper()]
    if bits.format != "int" or type(grid) is not Grid:
        raise Unfit(f"format {bits.format}; {PRESETS}")
    zero, middle = linear.zero_point, 2 ** (grid.bits - 1)
    whole = bool((zero == zero.round()).all()) and zero.min() >= 0 and zero.max() <= grid.max_code
    if not whole:
        raise Unfit("zero points outside of the codes; set include_zero=true in the method's rounding or clip")
    centred = bool((zero == middle).all())
    names = (OF_INTEGERS.get((grid.bits, True)), *OF_ZERO_POINTS.get(grid.bits, ()))
    known = [TYPES[name] for name in names if name is not None and (centred or not TYPES[name].symmetric)]
    for kind in known:
        if width % kind.width == 0:
            return kind
    if known:
        raise Unfit(f"{grid.bits} bits in groups of {width}: {known[0].name} needs bits.weight.group_size=256")
    sides = "symmetric" if centred else "asymmetric"
    instead = "bits.weight.symmetric=true" if (grid.bits, True) in OF_INTEGERS else "4, 5 or 8 bits"
    raise Unfit(f"there is no type of {grid.bits} bits, {sides}; use {instead}")


def _numbers(linear: QuantLinear, kind: BlockType) -> dict[str, Tensor]:
    """The scales of all blocks or sub-blocks of a row and, of types that are not symmetric, their minima.

    Those of K types are given with the sign turned.
    """
    assert linear.scale is not None
    assert linear.zero_point is not None
    n = linear.in_features // kind.width * (kind.subblocks or 1)
    scale, zero = (x.float().repeat_interleave(n // x.shape[1], 1) for x in (linear.scale, linear.zero_point))
    if kind.symmetric:
        return {"scales": scale}
    minimum = zero if isinstance(linear.grid, MinimumGrid) else -scale * zero
    return {"scales": scale, "minima": minimum if kind.subblocks is None else -minimum}


def _halves(x: Tensor) -> bool:
    """Whether float16 has all of these numbers."""
    return torch.equal(x.to(torch.float16).to(x.dtype), x)


def packed(linear: QuantLinear, kind: BlockType, rows: Tensor | None) -> Bytes:
    """The bytes of a linear [O, bytes per row], its outputs in the order `rows` [O]."""
    numbers = list[Tensor]()
    for x in _numbers(linear, kind).values():
        two = None if kind.subblocks is None else levels(x, kind.subblocks, kind.largest)
        numbers += [x] if two is None else [two[0], two[1].to(torch.uint8)]

    def ordered(x: Tensor) -> np.ndarray:  # type: ignore[type-arg]
        return (x if rows is None else x[rows.to(x.device)]).cpu().numpy()

    codes = ordered(linear.codes())
    return kind.pack(codes.reshape(len(codes), -1, kind.width), *map(ordered, numbers))
