"""What rounds keys, values and queries at run time: modules for `Block.heads`, `sequence` and `stored` (`kv.py`).

B batch, T tokens, W those computed, H heads, E head width, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from dqx.formats.integers import Grid, wide
from dqx.models.tokens import Tokens
from dqx.quant.fused import fake
from dqx.quant.registry import storable


def shared(share: str, x: Tensor, rounds: Callable[[Tensor], Tensor]) -> Tensor:
    """x [B, H, T, E] through `rounds`, which sees along its last dimension what shares a scale."""
    if share == "head":
        return rounds(x)
    by_token = x.transpose(1, 2)  # [B, T, H, E]
    return rounds(by_token.flatten(2)).view(by_token.shape).transpose(1, 2)


@storable
class HeadQuantizer(nn.Module):
    """Rounds [B, H, T, E] to one grid per token (`share` "token") or per token and head ("head")."""

    def __init__(self, grid: Grid, share: str, clip_ratio: float):
        super().__init__()
        self.grid, self.share, self.clip_ratio = grid, share, clip_ratio

    def forward(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        return shared(self.share, x, lambda rows: fake(self.grid, rows, self.clip_ratio))

    def extra_repr(self) -> str:
        return f"{self.grid.bits} bits per {self.share}, clip_ratio={self.clip_ratio}"


@storable
class ChannelQuantizer(nn.Module):
    """Rounds [B, H, W, E] to one grid per head and channel and `group` neighbouring tokens (None: all of a sequence).

    Groups are counted from a sequence's first token; the last one may hold fewer. What is not real enters no range and
    stays as it is. Ranges [B, H, G, E] are those of a forward of all tokens; what exceeds them later is cut.
    """

    whole_sequence = True

    def __init__(self, grid: Grid, group: int | None, clip_ratio: float):
        super().__init__()
        self.grid, self.group, self.clip_ratio = grid, group, clip_ratio

    def forward(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        tokens = Tokens.all_of(x) if tokens is None else tokens
        rows, heads, _, width = x.shape
        length = tokens.real.shape[1]
        size = length if self.group is None else self.group
        groups = tokens.computed((tokens.real.long().cumsum(-1) - 1).clamp(min=0) // size)
        counted = tokens.computed(tokens.real)[:, None, :, None]
        index, z = groups[:, None, :, None].expand_as(x), wide(x)

        def extreme(how: str, worst: float) -> Tensor:
            empty = z.new_zeros((rows, heads, -(-length // size), width))
            return empty.scatter_reduce(2, index, z.masked_fill(~counted, worst), how, include_self=False)

        lo = tokens.statistic("lo", lambda: extreme("amin", torch.inf))
        hi = tokens.statistic("hi", lambda: extreme("amax", -torch.inf))
        grids = self.grid.from_range(lo * self.clip_ratio, hi * self.clip_ratio)
        rounded = self.grid.nearest(z, *(numbers.gather(2, index) for numbers in grids))
        return torch.where(counted, rounded.to(x.dtype), x)

    def extra_repr(self) -> str:
        return f"{self.grid.bits} bits per channel, group={self.group}, clip_ratio={self.clip_ratio}"


@storable
class FixedRange(nn.Module):
    """Rounds [B, H, T, E] to one grid per head and channel for all tokens, of the range from lo to hi [H, 1, E]."""

    lo: Tensor
    hi: Tensor

    def __init__(self, grid: Grid, lo: Tensor, hi: Tensor):
        super().__init__()
        self.grid = grid
        self.register_buffer("lo", lo)
        self.register_buffer("hi", hi)

    def forward(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        return self.grid.nearest(wide(x), *self.grid.from_range(self.lo, self.hi)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.grid.bits} bits per channel, fixed ranges"


@storable
class AllButRecent(nn.Module):
    """Leaves the last `tokens` real ones of each sequence alone, as KIVI does, and shows `quantizer` the others."""

    whole_sequence = True

    def __init__(self, quantizer: nn.Module, tokens: int):
        super().__init__()
        self.quantizer, self.tokens = quantizer, tokens

    def forward(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        tokens = Tokens.all_of(x) if tokens is None else tokens
        left = tokens.real.long().flip(-1).cumsum(-1).flip(-1)  # how many real tokens there are from this one on
        older = replace(tokens, real=tokens.real & (left > self.tokens))
        return torch.where(older.computed(older.real)[:, None, :, None], self.quantizer(x, older), x)


@storable
class Centered(nn.Module):
    """Takes from keys [B, H, T, E] their mean over the tokens of their sequence [B, H, 1, E], and rounds what is left.

    The mean is not added again, as softmax ignores it; `restore` adds it, for keys that rope is still to turn, and for
    those of a cache, beside which attention sees others with their mean.
    """

    whole_sequence = True

    def __init__(self, quantizer: nn.Module, restore: bool = False):
        super().__init__()
        self.quantizer, self.restore = quantizer, restore

    def forward(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        mean = token_mean(x, tokens) if tokens is None else tokens.statistic("mean", lambda: token_mean(x, tokens))
        rounded: Tensor = self.quantizer((wide(x) - mean).to(x.dtype), tokens)
        return (wide(rounded) + mean).to(x.dtype) if self.restore else rounded


@storable
class BeforeBias(nn.Module):
    """Rounds keys [B, H, T, E] that have no bias yet (a quantizer of None does not), and adds it [H, 1, E]."""

    bias: Tensor

    def __init__(self, quantizer: nn.Module | None, bias: Tensor):
        super().__init__()
        self.quantizer = quantizer
        self.register_buffer("bias", bias)

    @property
    def whole_sequence(self) -> bool:
        return getattr(self.quantizer, "whole_sequence", False)

    def forward(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        rounded: Tensor = x if self.quantizer is None else self.quantizer(x, tokens)
        return rounded + self.bias


def token_mean(x: Tensor, tokens: Tokens | None) -> Tensor:
    """The mean [B, H, 1, E] of x [B, H, T, E] over the real tokens of each sequence; `wide`."""
    if tokens is None:
        return wide(x).mean(2, keepdim=True)
    counted = tokens.real[:, None, :, None]
    return torch.where(counted, wide(x), 0).sum(2, keepdim=True) / counted.sum(2, keepdim=True).clamp(min=1)
