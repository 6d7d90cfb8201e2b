"""Activation quantizers: the input of a linear, rounded at run time.

They differ in which values share a grid: those of a token or of a group of its channels (`PerToken`), or all, on a
range found in calibration (`Static`). Width, group size, symmetry and format come from `bits.activation`. Integers,
symmetric: `scale = absmax / (2^(b-1) - 1)`, as integer kernels have it; asymmetric: min ... max.

The block formats mxfp4 and nvfp4 fix themselves which channels share a scale: 32 and 16 neighbours of a token.
`PerToken` leaves it at that (for nvfp4 with a second-level scale per token), and `Static` takes the second-level scale
of nvfp4 from calibration, as NVIDIA's deployments do.

No result depends on what else is in the batch. I = inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from dqx.formats.bits import FORMATS, UNQUANTIZED, ActivationBits, block_formats
from dqx.formats.integers import Grid, extremes, wide
from dqx.formats.make import make_grid
from dqx.quant.fused import fake, in_range
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
    """One dynamic grid per token over all channels, or per group of `bits.group_size` neighbouring channels.

    With `rescale` the scale of every group is corrected after rounding, see `rescaled`.
    """

    clip_ratio: float = 1.0  # share of the range that is kept; values beyond it saturate
    include_zero: bool = True  # asymmetric ranges hold zero
    rescale: bool = False

    @property
    def grid_per_token(self) -> bool:
        """Whether `token_grid` says all: a token's scale and zero point, with which its codes are multiplied."""
        return not self.rescale

    def token_grid(self, x: Tensor, bits: ActivationBits) -> tuple[Grid, Tensor, Tensor]:
        """The grid of the tokens of x [..., I], and the scale and zero point [..., 1] of each, without groups."""
        grid = make_grid(bits, include_zero=self.include_zero, exact_absmax=True)
        lo, hi = (bound * self.clip_ratio for bound in extremes(x))
        return grid, *grid.from_range(lo, hi)

    def __call__(self, x: Tensor, bits: ActivationBits) -> Tensor:
        grid = make_grid(bits, include_zero=self.include_zero, exact_absmax=True)
        if grid.identity:
            return x
        groups = x if bits.group_size == -1 else x.unflatten(-1, (-1, bits.group_size))
        rounded = fake(grid, groups, self.clip_ratio)
        return (rescaled(groups, rounded) if self.rescale else rounded).view(x.shape)

    def problems(self, where: str, context: Context) -> list[str]:
        return clip_problems(f"{where}.clip_ratio", self.clip_ratio)


def rescaled(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` times `|x|^2 / <rounded, x>` for every vector along the last dimension [..., I], in the dtype of x.

    Afterwards its product with x is that of x with itself: rounding no longer shortens or lengthens a vector along its
    own direction. This is SoloQ's rule for scales. A vector that rounding leaves no part of keeps what it has.
    """
    z, q = wide(x), wide(rounded)
    product = (q * z).sum(-1, keepdim=True)
    factor = torch.where(product > 0, z.square().sum(-1, keepdim=True) / product, 1)
    return (q * factor).to(x.dtype)


@storable
@dataclass(frozen=True)
class PerGroup(Dynamic):
    """What versions of dqx have stored that had the group size here and not in `bits.activation`; only read."""

    group_size: int = 128  # channels
    clip_ratio: float = 1.0
    include_zero: bool = True

    def __call__(self, x: Tensor, bits: ActivationBits) -> Tensor:
        return PerToken(self.clip_ratio, self.include_zero)(x, replace(bits, group_size=self.group_size))


@dataclass(frozen=True)
class Static:
    """One grid per site for all channels and tokens, from the smallest and largest value in calibration."""

    clip_ratio: float = 1.0  # share of the range that is kept; values beyond it saturate
    include_zero: bool = True  # asymmetric ranges hold zero
    needs: ClassVar[frozenset[str]] = frozenset({"minmax"})
    grid_per_token: ClassVar[bool] = True

    def fit(self, stats: Stats) -> StaticRange:
        lo, hi = (self.clip_ratio * bound for bound in stats["minmax"].tolist())
        return StaticRange(lo, hi, self.include_zero)

    def problems(self, where: str, context: Context) -> list[str]:
        problems = clip_problems(f"{where}.clip_ratio", self.clip_ratio)
        sizes = {bits.group_size for bits in context.widths.activation.values() if bits.bits != UNQUANTIZED} - {-1}
        for size in sorted(sizes):
            problems.append(
                f"{where} has one calibrated range for all channels, but bits.activation.group_size={size} asks for "
                "one per group; write method.activation=per_token, or bits.activation.group_size=-1"
            )
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

    def token_grid(self, x: Tensor, bits: ActivationBits) -> tuple[Grid, Tensor, Tensor]:
        """The grid of all tokens of x [..., I], their scale and zero point []."""
        grid, bounds = self._grid(x, bits)
        return grid, *grid.from_range(*bounds)

    def __call__(self, x: Tensor, bits: ActivationBits) -> Tensor:
        grid, bounds = self._grid(x, bits)
        return x if grid.identity else in_range(grid, x, bounds)

    def _grid(self, x: Tensor, bits: ActivationBits) -> tuple[Grid, Tensor]:
        """The grid, and the range [2] on x's device."""
        grid = make_grid(bits, include_zero=self.include_zero, exact_absmax=True)
        dtype = wide(x[:0]).dtype
        lo, hi = (torch.full((), bound, dtype=dtype, device=x.device) for bound in (self.lo, self.hi))
        return grid, torch.stack((lo, hi))


def clip_problems(key: str, clip_ratio: float) -> list[str]:
    """What is wrong with a share of a range, the option at config key `key`."""
    return [] if 0 < clip_ratio <= 1 else [f"{key}={clip_ratio} must lie above 0 and not above 1; 1.0 clips nothing"]
