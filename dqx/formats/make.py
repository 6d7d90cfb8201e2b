"""The grid of a width and format."""

from __future__ import annotations

from dqx.formats.bits import UNQUANTIZED, ActivationBits, WeightBits
from dqx.formats.floats import FLOAT_GRIDS
from dqx.formats.gguf import GGUF_GRIDS
from dqx.formats.integers import Grid

#: The grids of formats that have nothing to choose.
FIXED_GRIDS: dict[str, Grid] = {**FLOAT_GRIDS, **GGUF_GRIDS}


def make_grid(bits: WeightBits | ActivationBits, *, include_zero: bool = True, exact_absmax: bool = False) -> Grid:
    """The grid of a width and format. The options are for integers; formats have nothing to choose."""
    if bits.format != "int" and bits.bits < UNQUANTIZED:
        return FIXED_GRIDS[bits.format]
    full_range = isinstance(bits, ActivationBits) and bits.full_range
    half_scales = bits.scale_dtype == "float16"
    return Grid(bits.bits, bits.symmetric, include_zero, exact_absmax, full_range, half_scales)
