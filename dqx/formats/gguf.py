"""The grids of GGUF's block types that are more than integers under a scale per group.

* `q4_1`, `q5_1`: `x = scale * code + minimum`, both in float16, per 32 inputs.
* `q4_k`, `q2_k`: the same per 32 and 16 inputs, where scales and minima of 256 neighbouring inputs (a superblock) are
  integers of 6 and 4 bits times one number each in float16.
* `q6_k`, `q3_k`: `x = scale * (code - 2^(b-1))` per 16 inputs, scales of a superblock likewise: of 8 and 6 bits, a
  sign among them, which is not used here.

Ranges become scales before any weight is rounded, those of a superblock together, so that every rounding chooses codes
on the grid that the file has. Zero points hold the minimum where there is one: a real number in place of an integer.

O = outputs, G = groups per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dqx.formats.bits import FORMATS
from dqx.formats.integers import Grid, half, wide


@dataclass(frozen=True)
class MinimumGrid(Grid):
    """Integers above a minimum: `x = scale * code + minimum`. Ranges are min ... max and need not hold zero."""

    def from_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and minimum, both numbers of float16."""
        return half((hi - lo) / self.max_code), half(lo, least=None)

    def codes(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return (wide(x) - zero_point).div_(scale).round_().clamp_(0, self.max_code)

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return (codes.to(scale.dtype) * scale).add_(zero_point)


@dataclass(frozen=True)
class MinimumSuperblocks(MinimumGrid):
    """`x = scale * code + minimum` with scales and minima in two levels. Ranges hold zero: minima are not positive."""

    largest: int = 63  # of the integers that make scales and minima
    groups: int = 8  # of a superblock
    superblocks: ClassVar[bool] = True

    def from_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """What a range would have if it were alone in its superblock, up to the rounding to float16."""
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        return ((hi - lo) / self.max_code).clamp(min=torch.finfo(lo.dtype).tiny), lo

    def from_ranges(self, lo_OG: Tensor, hi_OG: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and minima [O, G] of all groups of a weight."""
        minimum = -two_level((-lo_OG).clamp(min=0), self.groups, self.largest, least=0)
        step = (hi_OG.clamp(min=0) - minimum) / self.max_code
        return two_level(step, self.groups, self.largest), minimum


@dataclass(frozen=True)
class SymmetricSuperblocks(Grid):
    """`x = scale * (code - 2^(b-1))` with scales in two levels; `2 absmax / (2^b - 1)` is what they approach."""

    symmetric: bool = True
    largest: int = 127
    groups: int = 16
    superblocks: ClassVar[bool] = True

    def from_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """What a range would have if it were alone in its superblock, up to the rounding to float16."""
        step = self._step(lo, hi).clamp(min=torch.finfo(lo.dtype).tiny)
        return step, torch.full_like(step, 2 ** (self.bits - 1))

    def from_ranges(self, lo_OG: Tensor, hi_OG: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points [O, G] of all groups of a weight."""
        scale = two_level(self._step(lo_OG, hi_OG), self.groups, self.largest)
        return scale, torch.full_like(scale, 2 ** (self.bits - 1))

    def _step(self, lo: Tensor, hi: Tensor) -> Tensor:
        return torch.maximum(lo.abs(), hi.abs()) * 2 / self.max_code


def two_level(x_OG: Tensor, groups: int, largest: int, least: int = 1) -> Tensor:
    """Numbers [O, G] near those given, not negative, that for every `groups` neighbours are `d * k`.

    d is a number of float16 and k an integer from `least` to `largest`.
    """
    x = x_OG.unflatten(1, (-1, groups))
    d = half(x.amax(-1, keepdim=True) / largest)
    return (x / d).round_().clamp_(least, largest).mul_(d).flatten(1)


def levels(x_OG: Tensor, groups: int, largest: int) -> tuple[Tensor, Tensor] | None:
    """d [O, B] and k [O, B, groups] of numbers [O, G] that `two_level` can give, exactly; None for others."""
    x = x_OG.unflatten(1, (-1, groups))
    top = x.amax(-1)
    d, k = torch.zeros_like(top), torch.zeros_like(x)
    open_ = top > 0
    if bool((x < 0).any()):
        return None
    for most in range(largest, 0, -1):
        if not bool(open_.any()):
            break
        own, of = top[open_] / most, x[open_]
        multiples = (of / own[:, None]).round_()
        fits = (own.half().to(own.dtype) == own) & (multiples * own[:, None] == of).all(-1)
        at = open_.clone()
        at[open_] = fits
        d[at], k[at] = own[fits], multiples[fits]
        open_ &= ~at
    return None if bool(open_.any()) else (d, k)


def _groups(name: str) -> int:
    """The groups of a format's superblock."""
    format = FORMATS[name]
    assert format.superblock is not None
    assert format.block is not None
    return format.superblock // format.block


GGUF_GRIDS: dict[str, Grid] = {
    "q4_1": MinimumGrid(4),
    "q5_1": MinimumGrid(5),
    "q2_k": MinimumSuperblocks(2, largest=15, groups=_groups("q2_k")),
    "q3_k": SymmetricSuperblocks(3, largest=31, groups=_groups("q3_k")),
    "q4_k": MinimumSuperblocks(4, largest=63, groups=_groups("q4_k")),
    "q6_k": SymmetricSuperblocks(6, largest=127, groups=_groups("q6_k")),
}
