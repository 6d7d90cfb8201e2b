"""How many neighbouring channels a rotation turns together: a number, all of them, or those that share a scale.

`tile=group` takes the tile from the grids of a site's inputs: with mxfp4 the 32 channels that have a scale of their
own, with `bits.activation.group_size=64` those 64; where inputs stay in 16 bit, the groups of the weights. No outlier
then reaches the scale of another group. DuQuant++ (Lin et al. 2026, arXiv:2604.17789) rotates so for MXFP4, once,
without a permutation.
"""

from __future__ import annotations

from collections.abc import Sequence

from dqx.formats.bits import FORMATS, UNQUANTIZED
from dqx.quant.protocols import Context

GROUP = "group"


def tile_of(tile: int | str | None, context: Context, roles: Sequence[str]) -> int | None:
    """Channels that are rotated together in what the linears `roles` read; None: all of them."""
    return group_of(context, roles[0]) if isinstance(tile, str) else tile


def group_of(context: Context, role: str) -> int:
    """Neighbouring inputs of a role that share a scale at run time, or in its weight; -1: all of a token's or row's."""
    activation, weight = context.widths.activation[role], context.widths.weight[role]
    rounded = activation.bits != UNQUANTIZED and context.method.quantizes_input(role)
    bits = activation if rounded else weight
    known = FORMATS.get(bits.format)  # others are told by `bits_problems`
    return known.block if known is not None and known.block else bits.group_size


def group_problems(where: str, tile: int | str | None, context: Context, roles: Sequence[str]) -> list[str]:
    """Why the option `tile` at config key `where` has no group to take a tile from; nothing for numbers."""
    if not isinstance(tile, str):
        return []
    if tile != GROUP:
        return [f"{where}={tile} is unknown; write a number of channels, or group for those that share a scale"]
    groups = {role: group_of(context, role) for role in roles}
    if whole := [role for role, size in groups.items() if size == -1]:
        return [
            f"{where}=group: the inputs of {', '.join(whole)} have one scale for all channels, no groups; write "
            f"bits=w4a4g128 or bits=mxfp4, or {where}=128"
        ]
    if len(set(groups.values())) > 1:
        told = ", ".join(f"{role} {size}" for role, size in groups.items())
        return [f"{where}=group: what is rotated together has groups of different sizes ({told}); write {where}=32"]
    return []
