"""One block of a model's real shapes: random weights, and an input with planted outliers.

T tokens of a sequence, N of all, D hidden, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dqx.models.family import families
from dqx.models.plant import outlier_channels
from dqx.models.transformer import Architecture, Block
from dqx.quant.stream import block_statistics

LENGTH = 512  # tokens per sequence
HEAD = 128  # head width of both models; also the group size of weights and DuQuant's tile

#: The published shapes by name: llada_8b, dream_7b.
MODELS = {
    family.published[0].lower().replace("-", "_"): family.published[1]
    for family in families().values()
    if family.published is not None
}


def scaled(arch: Architecture, scale: int) -> Architecture:
    """The architecture with all widths divided by `scale`, heads as wide as before.

    Raises ValueError if that leaves a width that is no multiple of 128 or a model without heads.
    """
    widths = (arch.hidden_size, arch.mlp_size)
    kv = max(1, arch.n_kv_heads // max(1, scale))
    if scale < 1 or any(w % (scale * HEAD) for w in widths) or (arch.n_heads // scale) % kv:
        fits = [s for s in range(1, 65) if all(w % (s * HEAD) == 0 for w in widths)]
        raise ValueError(
            f"scale={scale} leaves no whole groups of {HEAD} in widths {widths[0]} and {widths[1]}; "
            f"{', '.join(map(str, fits))} do"
        )
    return replace(
        arch, hidden_size=widths[0] // scale, mlp_size=widths[1] // scale, n_heads=arch.n_heads // scale, n_kv_heads=kv
    )


@dataclass
class Case:
    """A block and the hidden states [S, T, D] that enter it."""

    block: Block
    hidden: Tensor

    def site_inputs(self) -> dict[str, Tensor]:
        """What the linears of every site read [S, T, I], in one pass through the block as it is now."""
        kept = block_statistics(self.block, self.hidden, ["inputs"])
        return {site: torch.cat(list(stats["inputs"])) for site, stats in kept.items()}


@torch.no_grad()
def make_case(arch: Architecture, n_tokens: int, seed: int = 0, *, length: int = LENGTH) -> Case:
    """A block with weights N(0, 1/fan_in), gains around 1, and `n_tokens` tokens of correlated hidden states.

    Planted: eight channels of each norm's gain are 20 times the others (outliers on all tokens at attn_in and mlp_in),
    and one channel of the MLP answers to a direction that 1 in 256 tokens have (massive outliers at mlp_out).
    """
    if n_tokens % length:
        raise ValueError(f"tokens={n_tokens} must be a multiple of {length}, the length of a sequence")
    g = torch.Generator().manual_seed(seed)
    block = Block(arch).requires_grad_(False)
    for role in arch.roles:
        linear: nn.Linear = getattr(block, role)
        linear.weight.normal_(0, linear.in_features**-0.5, generator=g)
        if linear.bias is not None:
            linear.bias.normal_(0, 0.5, generator=g)
    outliers = outlier_channels(arch.hidden_size, 8)
    for norm in (block.attn_norm, block.mlp_norm):
        norm.weight.copy_(torch.rand(arch.hidden_size, generator=g) + 0.5)
        norm.weight[outliers] *= 20
    hidden = torch.randn(n_tokens // length, length, arch.hidden_size, generator=g)
    hidden[..., 1:] += 0.7 * hidden[..., :-1]
    direction = torch.randn(arch.hidden_size, generator=g)
    hidden.view(n_tokens, -1)[100::256] = 3 * direction
    channel = arch.mlp_size // 3
    reading = direction / (block.mlp_norm.weight * arch.hidden_size)
    block.gate.weight[channel] = 20 * reading
    block.up.weight[channel] = 20 * reading
    return Case(block, hidden)
