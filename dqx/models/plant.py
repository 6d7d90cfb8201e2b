"""Plant activation outliers in a finished network without changing its function (`model.outliers.gain`).

A norm's gain at some channels is multiplied by `gain` and the columns behind it are divided by it; rows of `up`
are multiplied and columns of `down` divided. The linears' inputs then have outlier channels at attn_in, mlp_in
and mlp_out. Folding norms or scaling channels undoes exactly this, so such outliers test outlier statistics and
rank no method.
"""

from __future__ import annotations

import torch

from dqx.models.transformer import Block, MaskedDiffusionTransformer


def outlier_channels(width: int, count: int) -> list[int]:
    """`count` channels spread evenly over a width, away from its ends."""
    return [(2 * i + 1) * width // (2 * count) for i in range(min(count, width))]


@torch.no_grad()
def plant_outliers(model: MaskedDiffusionTransformer, gain: float, channels: int) -> None:
    """Rescale `channels` channels of every block by `gain`, in place; the logits stay the same up to rounding.

    Exact in floating point when `gain` is a power of two.
    """
    for block in model.blocks:
        assert isinstance(block, Block)
        plant_in_block(block, gain, channels)


@torch.no_grad()
def plant_in_block(block: Block, gain: float, channels: int) -> None:
    """`plant_outliers` in one block."""
    if gain == 1.0 or channels == 0:
        return
    hidden = outlier_channels(block.arch.hidden_size, channels)
    inner = outlier_channels(block.arch.mlp_size, channels)
    for norm, readers in ((block.attn_norm, (block.q, block.k, block.v)), (block.mlp_norm, (block.gate, block.up))):
        norm.weight[hidden] *= gain
        for linear in readers:
            linear.weight[:, hidden] /= gain
    block.up.weight[inner] *= gain
    if block.up.bias is not None:
        block.up.bias[inner] *= gain
    block.down.weight[:, inner] /= gain
