"""The grid of a width and format."""

from __future__ import annotations

from dqx.formats.bits import UNQUANTIZED, ActivationBits, WeightBits
from dqx.formats.floats import FLOAT_GRIDS
from dqx.formats.integers import Grid


def make_grid(bits: WeightBits | ActivationBits, *, include_zero: bool = True, exact_absmax: bool = False) -> Grid:
    """The grid of a width and format. The options are for integers; formats have nothing to choose."""
    if bits.format != "int" and bits.bits < UNQUANTIZED:
        return FLOAT_GRIDS[bits.format]
    return Grid(bits.bits, bits.symmetric, include_zero, exact_absmax)
