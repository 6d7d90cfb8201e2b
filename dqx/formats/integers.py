"""Uniform integer grids: scale, zero_point, codes. The only place that rounds to integers.

`x = scale * (codes - zero_point)` with codes 0 ... 2^bits - 1. Arithmetic is float32, or float64 for float64
input. O = outputs, I = inputs, G = groups per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dqx.formats.bits import UNQUANTIZED


def wide(x: Tensor) -> Tensor:
    """x in float32, or unchanged where it is float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def extremes(x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Smallest and largest values along `dim`, which is kept with size 1; `wide`.

    `torch.aminmax` does the same in one pass that is not vectorised along the last dimension: 8 times slower on a CPU.
    """
    x = wide(x)
    return x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)


def finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite, without a copy of x; the host waits for the device once."""
    return bool(torch.stack(torch.aminmax(x)).isfinite().all())


def half(x: Tensor, least: float | None = 2.0**-24) -> Tensor:
    """x rounded to numbers of float16, in its own dtype; to finite ones and, for scales, to `least` or above."""
    largest = torch.finfo(torch.float16).max
    return x.clamp(min=-largest if least is None else least, max=largest).to(torch.float16).to(x.dtype)


def bit_patterns(x: Tensor) -> Tensor:
    """The bits of floating-point numbers as integers: equal where the numbers are, -0.0 apart from 0.0."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


@dataclass(frozen=True)
class Grid:
    """How a range of real numbers becomes integers.

    asymmetric: `scale = (hi - lo) / (2^b - 1)`, `zero_point = round(-lo / scale)`.
    symmetric, as GPTQ's code does it: `lo = -hi`, `zero_point = 2^(b-1)`, and the same scale, so that -hi ... hi
    is cut into 2^b - 1 steps and +hi falls on the last half step. A range without negative values keeps lo = 0
    there, hence a scale half as large and saturation at 7/15 hi (4 bits): that is the published behaviour, and
    rare for groups of weights. With `exact_absmax` instead `scale = absmax / (2^(b-1) - 1)` (QuaRot, integer
    kernels), which represents +absmax and -absmax exactly. With `full_range` always `scale = 2 absmax / (2^b - 1)`
    (compressed-tensors, vLLM).

    With `half_scales` scales are numbers of float16. Codes are chosen by them, except in `fake`, where they are chosen
    by the scale before it is rounded, as llama.cpp does with activations.
    """

    bits: int
    symmetric: bool = False
    include_zero: bool = True  # widen the range to hold zero, so that 0.0 survives and zero_point fits in b bits
    exact_absmax: bool = False  # symmetric only
    full_range: bool = False  # symmetric only, goes before exact_absmax
    half_scales: bool = False
    block: ClassVar[int | None] = None  # inputs that share a scale, in formats that fix it
    superblocks: ClassVar[bool] = False  # whether `from_ranges` needs the groups of a row together

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

    def from_ranges(self, lo_OG: Tensor, hi_OG: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero_point [O, G] of all groups of a weight. Matters to formats with superblocks."""
        return self.from_range(lo_OG, hi_OG)

    def from_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero_point of the ranges lo ... hi, elementwise. An all-zero range is taken as -1 ... 1.

        A range of one repeated value other than zero is widened to zero, which represents that value exactly.
        """
        return self._from_range(lo, hi, half if self.half_scales else _as_is)

    def _from_range(self, lo: Tensor, hi: Tensor, stored: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        if self.include_zero:
            lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        else:
            constant = lo == hi
            lo, hi = torch.where(constant, lo.clamp(max=0), lo), torch.where(constant, hi.clamp(min=0), hi)
        empty = (lo == 0) & (hi == 0)
        lo, hi = torch.where(empty, -1, lo), torch.where(empty, 1, hi)
        tiny = torch.finfo(lo.dtype).tiny  # a denormal range would otherwise give scale 0
        if not self.symmetric:
            scale = stored(((hi - lo) / self.max_code).clamp(min=tiny))
            return scale, torch.round(-lo / scale)
        absmax = torch.maximum(-lo, hi)
        if self.full_range:
            scale = 2 * absmax / self.max_code
        elif self.exact_absmax:
            scale = absmax / (2 ** (self.bits - 1) - 1)
        else:
            scale = (absmax - torch.where(lo < 0, -absmax, lo)) / self.max_code
        return stored(scale.clamp(min=tiny)), torch.full_like(scale, 2 ** (self.bits - 1))

    def codes(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Nearest codes of x, halves to even, still as floating point numbers."""
        return (wide(x) / scale).round_().add_(zero_point).clamp_(0, self.max_code)

    def fake(self, x: Tensor, dim: int = -1, clip_ratio: float = 1.0) -> Tensor:
        """x rounded to its own grid along `dim`, in the dtype of x. `clip_ratio` shrinks the range first."""
        if self.identity:
            return x
        lo, hi = extremes(x, dim)
        scale, zero_point = self._from_range(lo * clip_ratio, hi * clip_ratio, _as_is)
        codes = self.codes(x, scale, zero_point)
        return self.dequantize(codes, half(scale) if self.half_scales else scale, zero_point).to(x.dtype)

    def nearest(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The points of the grid closest to x, in the dtype of the scale."""
        return self.dequantize(self.codes(x, scale, zero_point), scale, zero_point)

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """`scale * (codes - zero_point)`, broadcasting."""
        return (codes.to(scale.dtype) - zero_point).mul_(scale)


def _as_is(scale: Tensor) -> Tensor:
    return scale
