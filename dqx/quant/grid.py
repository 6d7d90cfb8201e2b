"""Uniform integer grids: scale, zero_point, codes. The only place that rounds to integers.

`x = scale * (codes - zero_point)` with codes 0 ... 2^bits - 1. Arithmetic is float32, or float64 for float64
input. O = outputs, I = inputs, G = groups per row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dqx.quant.bits import UNQUANTIZED, ActivationBits, WeightBits


def wide(x: Tensor) -> Tensor:
    """x in float32, or unchanged where it is float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def extremes(x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Smallest and largest values along `dim`, which is kept with size 1; `wide`.

    `torch.aminmax` does the same in one pass that is not vectorised along the last dimension: 8 times slower on a CPU.
    """
    x = wide(x)
    return x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)


@dataclass(frozen=True)
class Grid:
    """How a range of real numbers becomes integers.

    asymmetric: `scale = (hi - lo) / (2^b - 1)`, `zero_point = round(-lo / scale)`.
    symmetric, as GPTQ's code does it: `lo = -hi`, `zero_point = 2^(b-1)`, and the same scale, so that -hi ... hi
    is cut into 2^b - 1 steps and +hi falls on the last half step. A range without negative values keeps lo = 0
    there, hence a scale half as large and saturation at 7/15 hi (4 bits): that is the published behaviour, and
    rare for groups of weights. With `exact_absmax` instead `scale = absmax / (2^(b-1) - 1)` (QuaRot, integer
    kernels), which represents +absmax and -absmax exactly.
    """

    bits: int
    symmetric: bool = False
    include_zero: bool = True  # widen the range to hold zero, so that 0.0 survives and zero_point fits in b bits
    exact_absmax: bool = False  # symmetric only
    block: ClassVar[int | None] = None  # inputs that share a scale, in formats that fix it

    @property
    def identity(self) -> bool:
        """16 bits: nothing is rounded."""
        return self.bits >= UNQUANTIZED

    @property
    def max_code(self) -> int:
        if self.identity:
            raise ValueError(f"a grid of {self.bits} bits stands for 'not quantized' and has no codes")
        return 2**self.bits - 1

    def for_tensor(self, x: Tensor) -> Grid:
        """This grid for groups of x, all weights that are rounded together. Matters to formats with a tensor scale."""
        return self

    def fit(self, x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
        """Scale and zero_point of the values along `dim`, which is kept with size 1."""
        return self.from_range(*extremes(x, dim))

    def from_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero_point of the ranges lo ... hi, elementwise. An all-zero range is taken as -1 ... 1.

        A range of one repeated value other than zero is widened to zero, which represents that value exactly.
        """
        if self.include_zero:
            lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        else:
            constant = lo == hi
            lo, hi = torch.where(constant, lo.clamp(max=0), lo), torch.where(constant, hi.clamp(min=0), hi)
        empty = (lo == 0) & (hi == 0)
        lo, hi = torch.where(empty, -1, lo), torch.where(empty, 1, hi)
        tiny = torch.finfo(lo.dtype).tiny  # a denormal range would otherwise give scale 0
        if not self.symmetric:
            scale = ((hi - lo) / self.max_code).clamp(min=tiny)
            return scale, torch.round(-lo / scale)
        absmax = torch.maximum(-lo, hi)
        if self.exact_absmax:
            scale = absmax / (2 ** (self.bits - 1) - 1)
        else:
            scale = (absmax - torch.where(lo < 0, -absmax, lo)) / self.max_code
        return scale.clamp(min=tiny), torch.full_like(scale, 2 ** (self.bits - 1))

    def codes(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Nearest codes of x, halves to even, still as floating point numbers."""
        return (wide(x) / scale).round_().add_(zero_point).clamp_(0, self.max_code)

    def fake(self, x: Tensor, dim: int = -1, clip_ratio: float = 1.0) -> Tensor:
        """x rounded to its own grid along `dim`, in the dtype of x. `clip_ratio` shrinks the range first."""
        if self.identity:
            return x
        lo, hi = extremes(x, dim)
        scale, zero_point = self.from_range(lo * clip_ratio, hi * clip_ratio)
        return self.nearest(x, scale, zero_point).to(x.dtype)

    def nearest(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The points of the grid closest to x, in the dtype of the scale."""
        return self.dequantize(self.codes(x, scale, zero_point), scale, zero_point)

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """`scale * (codes - zero_point)`, broadcasting."""
        return (codes.to(scale.dtype) - zero_point).mul_(scale)


def make_grid(bits: WeightBits | ActivationBits, *, include_zero: bool = True, exact_absmax: bool = False) -> Grid:
    """The grid of a width and format. The options are for integers; formats have nothing to choose."""
    if bits.format != "int" and bits.bits < UNQUANTIZED:
        from dqx.quant.formats import FLOAT_GRIDS

        return FLOAT_GRIDS[bits.format]
    return Grid(bits.bits, bits.symmetric, include_zero, exact_absmax)


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
    """A rounded weight: what a quantized checkpoint has to store.

    With a `column_scale` the weight stands for `dequantize() * column_scale`; the linear before takes the scale over.
    """

    codes: Tensor  # [O, I] uint8
    scale: Tensor  # [O, G] float
    zero_point: Tensor  # [O, G] integers held as float
    group_index: Tensor  # [I] int64: the group of each input
    grid: Grid
    notes: tuple[str, ...] = ()  # what the rounding had to do differently than asked, in plain words
    column_scale: Tensor | None = None  # [I]

    def dequantize(self) -> Tensor:
        """The fake-quantized weight [O, I] in the dtype of the scales, without the column scale."""
        index = self.group_index
        return self.grid.dequantize(self.codes, self.scale[:, index], self.zero_point[:, index])

    def split(self, rows: list[int]) -> list[QuantizedWeight]:
        """Cut row-stacked weights apart again; `rows` are their output widths."""
        parts = zip(self.codes.split(rows), self.scale.split(rows), self.zero_point.split(rows), strict=True)
        return [replace(self, codes=c, scale=s, zero_point=z) for c, s, z in parts]


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
    width = group_width(n_in, group_size)
    whole = n_in - n_in % width
    found = []
    for first, last in ((0, whole), (whole, n_in)):
        if last == first:
            continue
        n_columns = min(width, last - first)
        columns_GW = torch.arange(first, last, device=w_OI.device).view(-1, n_columns)
        w_OGW = w_OI[:, first:last].reshape(n_out, -1, n_columns)
        found.append([bound.squeeze(-1) for bound in ranges(w_OGW, grid, clip, columns_GW)])
    lows, highs = zip(*found, strict=True)
    return torch.cat(lows, 1), torch.cat(highs, 1)


def ranges(w_OGW: Tensor, grid: Grid, clip: BoundClip | None, columns_GW: Tensor) -> tuple[Tensor, Tensor]:
    """The range lo, hi [O, G, 1] of every group: min and max, or what the clip says."""
    if clip is not None:
        return clip(w_OGW, grid, columns_GW)
    return extremes(w_OGW)
