"""Keys, values and, where asked for, queries rounded at run time, as a cache of few bits would hold them.

Values are rounded as they leave their projection, keys after the rotary embedding, each token by itself: one grid per
token over all heads, or one per token and head. A Hadamard transform of queries and keys leaves their products alone
and spreads a key's outlier channels before it is rounded (Ashkboos et al. 2024, arXiv:2404.00456, section 4; DuQuant's
code does it in tiles). Queries stay in 16 bit by default, as in QuaRot; the published codes of SmoothQuant and DuQuant
for diffusion models round them like keys.

Attention does not notice a vector that all keys of a sequence have in common: it adds the same number to all scores of
a query, which softmax ignores. So their mean need not be stored, and a few bits are spent on what tells keys apart
(`center`). Keys have a few large channels, the same for all tokens, so that a grid per channel over the tokens suits
them (Liu et al. 2024, KIVI, arXiv:2402.02750), and one before their bias, which is the largest part of these channels
where there is one (`before_bias`). No result depends on padding or on what else is in the batch.

`when` says where all of this happens: in every forward, as if its keys and values came out of a cache (`always`), or
where a sampler's cache stores them (`commit`). Then what a forward reads from the cache is rounded, while the tokens it
computes attend to each other in full precision; a forward without a cache, as likelihoods and calibration make them,
rounds nothing.

B batch, T tokens, H heads, E head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dqx.formats.bits import FORMATS, UNQUANTIZED, ActivationBits
from dqx.formats.integers import Grid, wide
from dqx.formats.make import make_grid
from dqx.models.transformer import Block, compose
from dqx.quant.activation import clip_problems
from dqx.quant.fused import fake
from dqx.quant.protocols import Context
from dqx.quant.registry import storable
from dqx.quant.transforms.hadamard import OnlineHadamard, tile_problems

WHEN = ("always", "commit")
SHARES = {"keys": ("token", "head", "channel"), "values": ("token", "head")}


@dataclass(frozen=True)
class KeysValues:
    """Which of keys, values and queries are rounded, and which numbers share a scale.

    Widths come from `bits.kv`, symmetry and format from `bits.activation`. Queries have the width of keys. Symmetric:
    `scale = absmax / (2^(b-1) - 1)`.
    """

    keys: str | None = "token"  # token: one scale per token over all heads; head: per token and head; channel: per
    # channel, over `token_group` tokens; None: 16 bit
    values: str | None = "token"  # token, head or None
    queries: bool = False  # round queries too, like keys
    key_clip_ratio: float = 1.0  # share of the range of keys (and queries) that is kept
    value_clip_ratio: float = 1.0
    include_zero: bool = True  # asymmetric ranges hold zero
    center: str | None = None  # mean: keys without their mean over the sequence's tokens, by head and channel
    token_group: int | None = None  # channel: neighbouring tokens that share a scale; None: all of the sequence
    recent: int = 0  # the last tokens of a sequence, whose keys and values stay as they are
    before_bias: bool = False  # keys are rounded before their bias is added and before rope
    when: str = "always"  # keys and values are rounded in every forward; commit: where a sampler's cache stores them
    rotate: bool = False  # Hadamard transform of queries and keys before keys are rounded
    tile: int | None = None  # channels per transform; None: the head's width

    @property
    def stored_only(self) -> bool:
        """Whether a forward without a cache rounds nothing."""
        return self.when == "commit"

    @property
    def whole_sequence(self) -> bool:
        """Whether a token's keys and values are rounded by what other tokens' are, in forwards of a few tokens too."""
        return self._by_others and not self.stored_only

    @property
    def _by_others(self) -> bool:
        return self.center is not None or self.keys == "channel" or self.recent > 0

    def install(self, block: Block, keys: ActivationBits, values: ActivationBits) -> None:
        """Put quantizers of each token behind what `block.heads` holds, those of whole sequences into `block.sequence`,
        and all of them into `block.stored` where only what a cache stores is rounded."""
        key_grid, value_grid = (
            make_grid(bits, include_zero=self.include_zero, exact_absmax=True) for bits in (keys, values)
        )

        def put(part: str, quantizer: nn.Module, by_others: bool) -> None:
            if self.stored_only:
                block.stored[part] = quantizer
            elif by_others:
                block.sequence[part] = quantizer
            else:
                compose(block.heads, part, quantizer)

        if self.keys is not None and not key_grid.identity:
            if self.rotate:
                compose(block.heads, "q", OnlineHadamard(self.tile))
                compose(block.heads, "k", OnlineHadamard(self.tile))
            if self.queries:
                compose(block.heads, "q", HeadQuantizer(key_grid, self.keys, self.key_clip_ratio))
            quantizer = self._of_keys(key_grid, self.keys)
            if self.before_bias:
                bias = block.k.bias.detach()
                block.k.bias = nn.Parameter(torch.zeros_like(bias), requires_grad=False)
                bias = bias.view(-1, 1, block.arch.head_size)
                block.sequence["projected"] = BeforeBias(None, bias)
                put("projected", BeforeBias(quantizer, bias), True)
            else:
                put("k", quantizer, self._by_others)
        if self.values is not None and not value_grid.identity:
            of_values: nn.Module = HeadQuantizer(value_grid, self.values, self.value_clip_ratio)
            if self.recent:
                of_values = AllButRecent(of_values, self.recent)
            put("v", of_values, self.recent > 0)

    def _of_keys(self, grid: Grid, share: str) -> nn.Module:
        quantizer: nn.Module
        if share == "channel":
            quantizer = ChannelQuantizer(grid, self.token_group, self.key_clip_ratio)
        else:
            quantizer = HeadQuantizer(grid, share, self.key_clip_ratio)
        if self.recent:
            quantizer = AllButRecent(quantizer, self.recent)
        return quantizer if self.center is None else Centered(quantizer, self.before_bias or self.stored_only)

    def problems(self, where: str, context: Context) -> list[str]:
        problems = []
        for name, share in (("keys", self.keys), ("values", self.values)):
            if share is not None and share not in SHARES[name]:
                known = ", ".join(SHARES[name])
                problems.append(f"{where}.{name}={share} is unknown; write {known}, or null for 16 bit")
        problems += clip_problems(f"{where}.key_clip_ratio", self.key_clip_ratio)
        problems += clip_problems(f"{where}.value_clip_ratio", self.value_clip_ratio)
        if self.center not in (None, "mean"):
            problems.append(f"{where}.center={self.center} is unknown; write mean, or null to leave the mean in keys")
        elif self.center is not None and self.keys is None:
            problems.append(
                f"{where}.center={self.center} is for keys that are rounded, but {where}.keys=null leaves them alone; "
                f"write {where}.keys=token, or {where}.center=null"
            )
        if self.queries and self.keys is None:
            problems.append(
                f"{where}.queries=true rounds queries like keys, but {where}.keys=null leaves keys alone; "
                f"write {where}.keys=head, or {where}.queries=false"
            )
        if self.rotate and self.keys is not None and context.widths.keys.bits != UNQUANTIZED:
            problems += tile_problems(f"{where}.tile", context.arch.head_size, self.tile, "the width of a head")
        problems += self._sequence_problems(where) + self._when_problems(where)
        if self.before_bias and context.widths.keys.bits != UNQUANTIZED:
            problems += self._bias_problems(where, context)
        return problems + self._format_problems(where, context)

    def _sequence_problems(self, where: str) -> list[str]:
        """What is wrong with the options that are about all tokens of a sequence."""
        problems = []
        if self.recent < 0:
            problems.append(f"{where}.recent={self.recent} must be 0 (all tokens are rounded) or more")
        if self.token_group is not None and self.keys != "channel":
            problems.append(
                f"{where}.token_group={self.token_group} is for keys with a grid per channel; write "
                f"{where}.keys=channel, or {where}.token_group=null"
            )
        elif self.token_group is not None and self.token_group < 1:
            problems.append(
                f"{where}.token_group={self.token_group} must be 1 or more, or null for all tokens of a sequence"
            )
        if self.queries and self.keys == "channel":
            problems.append(
                f"{where}.queries=true rounds queries like keys, but {where}.keys=channel has grids over the tokens of "
                f"a cache, in which there are no queries; write {where}.queries=false, or {where}.keys=head"
            )
        return problems

    def _when_problems(self, where: str) -> list[str]:
        problems = []
        if self.when not in WHEN:
            problems.append(f"{where}.when={self.when} is unknown; write {' or '.join(WHEN)}")
        if self.queries and self.stored_only:
            problems.append(
                f"{where}.queries=true rounds queries, but {where}.when=commit rounds what a cache stores, in which "
                f"there are no queries; write {where}.queries=false, or {where}.when=always"
            )
        return problems

    def _bias_problems(self, where: str, context: Context) -> list[str]:
        problems = []
        if self.keys is None:
            problems.append(
                f"{where}.before_bias=true is for keys that are rounded, but {where}.keys=null leaves them alone; "
                f"write {where}.keys=token, or {where}.before_bias=false"
            )
        if not context.arch.qkv_bias:
            problems.append(
                f"{where}.before_bias=true rounds keys before their bias is added, but this model, of family "
                f"{context.arch.family}, has no bias there; write {where}.before_bias=false"
            )
        if self.rotate:
            problems.append(
                f"{where}.before_bias=true rounds keys before rope, but {where}.rotate=true rotates them after it; "
                f"write {where}.rotate=false, or {where}.before_bias=false"
            )
        return problems

    def _format_problems(self, where: str, context: Context) -> list[str]:
        """What keeps the format of the activations, which keys and values share, from being theirs."""
        problems, widths = list[str](), context.widths
        parts = [("keys", self.keys, widths.keys), ("values", self.values, widths.values)]
        parts = [part for part in parts if part[1] is not None and part[2].bits != UNQUANTIZED]
        parts = [part for part in parts if part[2].format in FORMATS]
        told = {"bits" if widths.keys == widths.values else name: bits for name, _, bits in parts}
        for name, bits in told.items():
            known = FORMATS[bits.format].widths
            if bits.format != "int" and bits.bits not in known:
                problems.append(
                    f"bits.kv.{name}={bits.bits}: keys and values have the format of the activations, "
                    f"bits.activation.format={bits.format}, which has {', '.join(map(str, known))} bits; write "
                    f"bits.kv.{name}={known[-1]} or bits.kv.{name}=16"
                )
        for name, share, bits in parts:
            width = context.arch.head_size if share == "head" else context.arch.n_kv_heads * context.arch.head_size
            block = FORMATS[bits.format].block
            if block and share == "channel":
                problems.append(
                    f"{where}.keys=channel has a scale per channel, but {bits.format} shares one among {block} "
                    f"channels; write {where}.keys=token, or bits.activation.format=int"
                )
            elif block and width % block:
                problems.append(
                    f"{where}.{name}={share}: {width} channels cannot be cut into the blocks of {block} in which "
                    f"{bits.format} shares a scale; write {where}.{name}=null, or bits.kv.{name}=16"
                )
        return problems


@storable
class HeadQuantizer(nn.Module):
    """Rounds [B, H, T, E] to one grid per token (`share` "token") or per token and head ("head")."""

    def __init__(self, grid: Grid, share: str, clip_ratio: float):
        super().__init__()
        self.grid, self.share, self.clip_ratio = grid, share, clip_ratio

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        if self.share == "head":
            return fake(self.grid, x, self.clip_ratio)
        tokens = x.transpose(1, 2)  # [B, T, H, E]
        rounded = fake(self.grid, tokens.flatten(2), self.clip_ratio)
        return rounded.view(tokens.shape).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"{self.grid.bits} bits per {self.share}, clip_ratio={self.clip_ratio}"


@storable
class ChannelQuantizer(nn.Module):
    """Rounds [B, H, T, E] to one grid per head and channel and `group` neighbouring tokens (None: all).

    Groups are counted from the first token where `real` [B, T] is True; the last one may hold fewer. What is not real
    enters no range and stays as it is.
    """

    whole_sequence = True

    def __init__(self, grid: Grid, group: int | None, clip_ratio: float):
        super().__init__()
        self.grid, self.group, self.clip_ratio = grid, group, clip_ratio

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        rows, heads, tokens, width = x.shape
        if real is None:
            real = torch.ones((rows, tokens), dtype=torch.bool, device=x.device)
        size = tokens if self.group is None else self.group
        groups = (real.long().cumsum(-1) - 1).clamp(min=0) // size
        index = groups[:, None, :, None].expand_as(x)
        counted, z = real[:, None, :, None], wide(x)

        def extreme(how: str, worst: float) -> Tensor:
            empty = z.new_zeros((rows, heads, -(-tokens // size), width))
            return empty.scatter_reduce(2, index, z.masked_fill(~counted, worst), how, include_self=False)

        lo, hi = extreme("amin", torch.inf), extreme("amax", -torch.inf)
        grids = self.grid.from_range(lo * self.clip_ratio, hi * self.clip_ratio)
        rounded = self.grid.nearest(z, *(numbers.gather(2, index) for numbers in grids))
        return torch.where(counted, rounded.to(x.dtype), x)

    def extra_repr(self) -> str:
        return f"{self.grid.bits} bits per channel, group={self.group}, clip_ratio={self.clip_ratio}"


@storable
class AllButRecent(nn.Module):
    """Leaves the last `tokens` real ones of each sequence alone, as KIVI does, and shows `quantizer` the others."""

    whole_sequence = True

    def __init__(self, quantizer: nn.Module, tokens: int):
        super().__init__()
        self.quantizer, self.tokens = quantizer, tokens

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        if real is None:
            real = torch.ones((len(x), x.shape[2]), dtype=torch.bool, device=x.device)
        left = real.long().flip(-1).cumsum(-1).flip(-1)  # how many real tokens there are from this one on
        older = real & (left > self.tokens)
        return torch.where(older[:, None, :, None], self.quantizer(x, older), x)


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

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        mean = token_mean(x, real)
        rounded: Tensor = self.quantizer((wide(x) - mean).to(x.dtype), real)
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

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        rounded: Tensor = x if self.quantizer is None else self.quantizer(x, real)
        return rounded + self.bias


def token_mean(x: Tensor, real: Tensor | None) -> Tensor:
    """The mean [B, H, 1, E] of x [B, H, T, E] over the tokens where `real` [B, T] is True (None: all); `wide`."""
    if real is None:
        return wide(x).mean(2, keepdim=True)
    counted = real[:, None, :, None]
    return torch.where(counted, wide(x), 0).sum(2, keepdim=True) / counted.sum(2, keepdim=True).clamp(min=1)
