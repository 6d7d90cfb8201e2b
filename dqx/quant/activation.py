"""Activation quantizers: the input of a linear, rounded at run time.

They differ in which values share a grid: those of a token (`PerToken`), of a group of a token's channels (`PerGroup`),
or all, on a range found in calibration (`Static`). Width, symmetry and format come from `bits.activation`. Integers,
symmetric: `scale = absmax / (2^(b-1) - 1)`, as integer kernels have it; asymmetric: min ... max.

The block formats mxfp4 and nvfp4 fix themselves which channels share a scale: 32 and 16 neighbours of a token.
`PerToken` leaves it at that (for nvfp4 with a second-level scale per token), `Static` takes the second-level scale of
nvfp4 from calibration, as NVIDIA's deployments do, and `PerGroup` has nothing to add.

No result depends on what else is in the batch. I = inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import ClassVar, Self

import torch
from torch import Tensor

from dqx.formats.bits import FORMATS, UNQUANTIZED, ActivationBits, block_formats
from dqx.formats.integers import wide
from dqx.formats.make import make_grid
from dqx.quant.protocols import Context, Stats
from dqx.quant.registry import storable


class Dynamic:
    """A quantizer that finds its grids at run time, so that calibration has nothing to tell it."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def fit(self, stats: Stats) -> Self:
        return self


@storable
@dataclass(frozen=True)
class PerToken(Dynamic):
    """One dynamic grid per token, over all channels."""

    clip_ratio: float = 1.0  # share of the range that is kept; values beyond it saturate
    include_zero: bool = True  # asymmetric ranges hold zero

    def __call__(self, x: Tensor, bits: ActivationBits) -> Tensor:
        grid = make_grid(bits, include_zero=self.include_zero, exact_absmax=True)
        return grid.fake(x, clip_ratio=self.clip_ratio)

    def problems(self, where: str, context: Context) -> list[str]:
        return clip_problems(f"{where}.clip_ratio", self.clip_ratio)


@storable
@dataclass(frozen=True)
class PerGroup(Dynamic):
    """One dynamic grid per token and group of neighbouring channels."""

    group_size: int = 128  # channels
    clip_ratio: float = 1.0  # share of the range that is kept; values beyond it saturate
    include_zero: bool = True  # asymmetric ranges hold zero

    def __call__(self, x: Tensor, bits: ActivationBits) -> Tensor:
        if bits.bits == UNQUANTIZED:
            return x
        groups = x.unflatten(-1, (-1, self.group_size))
        return PerToken(self.clip_ratio, self.include_zero)(groups, bits).flatten(-2)

    def problems(self, where: str, context: Context) -> list[str]:
        problems = clip_problems(f"{where}.clip_ratio", self.clip_ratio)
        for name in block_formats(context.widths.activation.values()):
            problems.append(
                f"bits.activation.format={name} has a scale per {FORMATS[name].block} channels by its specification, "
                f"so that {where}.group_size has no meaning; write method.activation=per_token"
            )
        by_width: dict[int, list[str]] = {}
        for role, bits in context.widths.activation.items():
            if context.method.quantizes_input(role) and bits.bits != UNQUANTIZED:
                by_width.setdefault(context.arch.in_features(role), []).append(role)
        common = gcd(*by_width)
        for width, roles in by_width.items():
            if self.group_size < 1 or width % self.group_size:
                problems.append(
                    f"{where}.group_size={self.group_size} does not divide {width}, the inputs of {', '.join(roles)}; "
                    f"{common & -common} does, and method.activation=per_token needs no group size"
                )
        return problems


@dataclass(frozen=True)
class Static:
    """One grid per site for all channels and tokens, from the smallest and largest value in calibration."""

    clip_ratio: float = 1.0  # share of the range that is kept; values beyond it saturate
    include_zero: bool = True  # asymmetric ranges hold zero
    needs: ClassVar[frozenset[str]] = frozenset({"minmax"})

    def fit(self, stats: Stats) -> StaticRange:
        lo, hi = (self.clip_ratio * bound for bound in stats["minmax"].tolist())
        return StaticRange(lo, hi, self.include_zero)

    def problems(self, where: str, context: Context) -> list[str]:
        problems = clip_problems(f"{where}.clip_ratio", self.clip_ratio)
        for name in block_formats(context.widths.activation.values()):
            if not FORMATS[name].tensor_bits:
                problems.append(
                    f"bits.activation.format={name} finds the scale of every {FORMATS[name].block} channels at run "
                    "time and has no other that could be static; write method.activation=per_token"
                )
        return problems


@storable
@dataclass(frozen=True)
class StaticRange:
    """Rounds to the grid of a fixed range."""

    lo: float
    hi: float
    include_zero: bool = True

    def __call__(self, x: Tensor, bits: ActivationBits) -> Tensor:
        grid = make_grid(bits, include_zero=self.include_zero, exact_absmax=True)
        if grid.identity:
            return x
        lo, hi = (torch.full((), bound, dtype=wide(x[:0]).dtype, device=x.device) for bound in (self.lo, self.hi))
        if grid.block is not None:
            return grid.for_tensor(torch.stack((lo, hi))).fake(x)
        return grid.nearest(x, *grid.from_range(lo, hi)).to(x.dtype)


def clip_problems(key: str, clip_ratio: float) -> list[str]:
    """What is wrong with a share of a range, the option at config key `key`."""
    return [] if 0 < clip_ratio <= 1 else [f"{key}={clip_ratio} must lie above 0 and not above 1; 1.0 clips nothing"]
