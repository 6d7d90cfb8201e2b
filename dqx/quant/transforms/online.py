"""Hadamard transforms inside a block, with a part that runs online; the function computed stays the same.

Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456, section 4, stages 1b to 1d. Between v and o a Hadamard matrix over
all channels is the product of one inside every head, folded into v, and one over the heads, which attention does not
mix with channels and which therefore runs before o. Before down nothing can be folded: the gated product comes
between. Biases of v are rotated like its rows, which the study's code for Dream leaves out.

D hidden, H heads, F MLP width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dqx.models.transformer import Block, compose
from dqx.quant.protocols import Context, ModelChange
from dqx.quant.transforms.hadamard import (
    OnlineHadamard,
    OnlineHeads,
    core,
    no_matrix,
    tile_problems,
    transform,
    transform_heads,
)
from dqx.quant.transforms.rotate import map_outputs, map_rows
from dqx.quant.transforms.tiles import group_problems, tile_of


@dataclass(frozen=True)
class HeadRotation:
    """Hadamard transform of the values: inside every head folded into v and o, over the heads at run time before o."""

    online: bool = True  # false: only inside the heads, which costs nothing at run time
    scope: ClassVar[str] = "model"

    def prepare(self, context: Context, device: torch.device) -> ModelChange:
        return ModelChange(lambda model: None, lambda block: rotate_heads(block, online=self.online))

    def problems(self, where: str, context: Context) -> list[str]:
        problems = []
        heads, size = context.arch.n_heads, context.arch.head_size
        if core(size) is None:
            problems.append(f"{where}: the width of a head: {no_matrix(size)}; leave this transform out: ~{where}")
        if self.online and core(heads) is None:
            problems.append(f"{where}.online=true: {heads} heads: {no_matrix(heads)}; write {where}.online=false")
        return problems


@dataclass(frozen=True)
class OnlineDown:
    """Hadamard transform of the input of down at run time, undone in its weight."""

    tile: int | str | None = None  # transform every `tile` neighbouring channels by themselves; None: all channels
    # together; group: those that share a scale, see `tiles.py`
    scope: ClassVar[str] = "model"

    def prepare(self, context: Context, device: torch.device) -> ModelChange:
        tile = tile_of(self.tile, context, context.arch.sites["mlp_out"])
        return ModelChange(lambda model: None, lambda block: rotate_down(block, tile))

    def problems(self, where: str, context: Context) -> list[str]:
        roles = context.arch.sites["mlp_out"]
        if problems := group_problems(f"{where}.tile", self.tile, context, roles):
            return problems
        tile = tile_of(self.tile, context, roles)
        return tile_problems(f"{where}.tile", context.arch.mlp_size, tile, "the inputs of down")


@torch.no_grad()
def rotate_heads(block: Block, *, online: bool = True, heads_HH: Tensor | None = None) -> None:
    """Rows of v (and its bias) through the transform inside every head; columns of o through that and, `online`,
    through the one over heads, which joins `block.inputs["attn_out"]`. `heads_HH` replaces the core over heads.

    Grouped heads need nothing special: every query head reads a v head that is rotated in the same way. Raises
    ValueError for widths without a Hadamard matrix.
    """
    n_heads, size = block.arch.n_heads, block.arch.head_size
    map_outputs(block.v, lambda rows: transform(rows, size))
    map_rows(block.o.weight, lambda rows: transform(rows, size))
    if online:
        map_rows(block.o.weight, lambda rows: transform_heads(rows, n_heads, heads_HH))
        compose(block.inputs, "attn_out", OnlineHeads(n_heads, heads_HH))


@torch.no_grad()
def rotate_down(block: Block, tile: int | None = None, matrix_KK: Tensor | None = None) -> None:
    """Rows of down's weight [D, F] through the transform, which joins `block.inputs["mlp_out"]`.

    `matrix_KK` replaces the core of `transform`. Raises ValueError for widths without a Hadamard matrix.
    """
    map_rows(block.down.weight, lambda rows: transform(rows, tile, matrix_KK))
    compose(block.inputs, "mlp_out", OnlineHadamard(tile, matrix_KK))
