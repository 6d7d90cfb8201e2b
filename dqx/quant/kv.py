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
where there is one (`before_bias`), or one whose large gains are folded into queries where a norm makes them
(`fold_gain`). No result depends on padding or on what else is in the batch.

`when` says where all of this happens: in every forward, as if its keys and values came out of a cache (`always`), or
where a sampler's cache stores them (`commit`). Then what a forward reads from the cache is rounded, while the tokens it
computes attend to each other in full precision; a forward without a cache, as likelihoods and calibration on text make
them, rounds nothing; calibration on a sampler's passes (`dqx/data/passes.py`) reads what they would have stored.

How much of the values' range is kept is set (`value_clip_ratio`) or found on calibration text (`value_clip.py`).

Beside a sampler's cache the forward that fills it has all tokens of a sequence at hand: there means and ranges are
found. With `always` the block's later forwards, of a window alone, use them again: they take the same mean off the new
keys and round them on the grids of the groups in which their tokens lie, whose ends cut what exceeds them; which tokens
are the last ones follows from their places. With `commit` a window's own keys are not rounded, and stored ones have
their mean again. Where final tokens are stored once, block by block, means and ranges are those of the tokens that one
forward stores: the prompt's, then each block's, groups counted from the first of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dqx.formats.bits import FORMATS, UNQUANTIZED, ActivationBits
from dqx.formats.integers import Grid, wide
from dqx.formats.make import make_grid
from dqx.models.transformer import Block, compose
from dqx.quant.activation import clip_problems
from dqx.quant.kv_quantizers import (
    AllButRecent,
    BeforeBias,
    Centered,
    ChannelQuantizer,
    FixedRange,
    HeadQuantizer,
    shared,
)
from dqx.quant.protocols import Context
from dqx.quant.transforms.hadamard import OnlineHadamard, tile_problems
from dqx.quant.value_clip import ValueClip, value_range

if TYPE_CHECKING:
    from dqx.quant.stream import Stream

WHEN = ("always", "commit")
SHARES = {"keys": ("token", "head", "channel"), "values": ("token", "head", "static")}


@dataclass(frozen=True)
class KeysValues:
    """Which of keys, values and queries are rounded, and which numbers share a scale.

    Widths come from `bits.kv`, symmetry and format from `bits.activation`. Queries have the width of keys. Symmetric:
    `scale = absmax / (2^(b-1) - 1)`.
    """

    keys: str | None = "token"  # token: one scale per token over all heads; head: per token and head; channel: per
    # channel, over `token_group` tokens; None: 16 bit
    values: str | None = "token"  # token, head, None; static: per head and channel, one range for all tokens, which
    # calibration finds
    queries: bool = False  # round queries too, like keys
    key_clip_ratio: float = 1.0  # share of the range of keys (and queries) that is kept
    value_clip_ratio: float = 1.0
    value_clip: ValueClip | None = None  # finds that share for each block, or static channel, on calibration text
    include_zero: bool = True  # asymmetric ranges hold zero
    center: str | None = None  # mean: keys without their mean over the sequence's tokens, by head and channel
    token_group: int | None = None  # channel: neighbouring tokens that share a scale; None: all of the sequence
    recent: int = 0  # the last tokens of a sequence, whose keys and values stay as they are
    before_bias: bool = False  # keys are rounded before their bias is added and before rope
    fold_gain: bool = False  # channels of keys that their norm makes large are divided, those of queries multiplied
    when: str = "always"  # keys and values are rounded in every forward; commit: where a sampler's cache stores them
    rotate: bool = False  # Hadamard transform of queries and keys before keys are rounded
    tile: int | None = None  # channels per transform; None: the head's width

    @property
    def stored_only(self) -> bool:
        """Whether a forward without a cache rounds nothing."""
        return self.when == "commit"

    @property
    def whole_sequence(self) -> bool:
        """Whether a token's keys and values are rounded by what other tokens' are."""
        return self.center is not None or self.keys == "channel" or self.recent > 0

    @property
    def needs(self) -> frozenset[str]:
        """What it looks at in calibration; empty where ranges are found at run time, and nothing is searched."""
        ranges = {"minmax"} if self.values == "static" else set()
        return frozenset(ranges | ({"weights"} if self.value_clip is not None and self.values is not None else set()))

    def install(self, block: Block, keys: ActivationBits, values: ActivationBits, stream: Stream | None = None) -> None:
        """Put quantizers of each token behind what `block.heads` holds, those of whole sequences into `block.sequence`,
        and all of them into `block.stored` where only what a cache stores is rounded.

        `stream` is for a part with `needs`; nothing of the block is rounded yet."""
        key_grid, value_grid = (
            make_grid(bits, include_zero=self.include_zero, exact_absmax=True) for bits in (keys, values)
        )

        of_values = None if self.values is None or value_grid.identity else self._of_values(block, value_grid, stream)

        def put(part: str, quantizer: nn.Module, sequence: bool) -> None:
            if self.stored_only:
                block.stored[part] = quantizer
            elif sequence:
                block.sequence[part] = quantizer
            else:
                compose(block.heads, part, quantizer)

        if self.keys is not None and not key_grid.identity:
            if self.fold_gain:
                fold_gain(block)
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
                put("k", quantizer, self.whole_sequence)
        if of_values is not None:
            put("v", AllButRecent(of_values, self.recent) if self.recent else of_values, self.recent > 0)

    def _of_values(self, block: Block, grid: Grid, stream: Stream | None) -> nn.Module:
        share, clip = self.values, self.value_clip
        assert share is not None
        if not self.needs:
            return HeadQuantizer(grid, share, self.value_clip_ratio)
        if stream is None:
            raise ValueError("values=static and value_clip look at calibration text; give the stream of the model")
        if clip is not None and share != "static":
            return HeadQuantizer(grid, share, clip.share(block, stream, partial(_rounded, grid, share)))
        lo, hi = value_range(block, stream)
        kept: Tensor | float = self.value_clip_ratio
        if clip is not None:
            found = clip.shares(block, stream, lambda v, ratio: FixedRange(grid, lo * ratio, hi * ratio)(v))
            kept = found.to(lo.dtype)
        return FixedRange(grid, lo * kept, hi * kept)

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
        problems += self._clip_problems(where, context)
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
        if self.fold_gain and context.widths.keys.bits != UNQUANTIZED:
            problems += self._gain_problems(where, context)
        if self.before_bias and context.widths.keys.bits != UNQUANTIZED:
            problems += self._bias_problems(where, context)
        return problems + self._format_problems(where, context)

    def _clip_problems(self, where: str, context: Context) -> list[str]:
        if self.value_clip is None:
            return []
        problems = self.value_clip.problems(f"{where}.value_clip", context)
        if self.values is None:
            problems.append(
                f"{where}.value_clip is for values that are rounded, but {where}.values=null leaves them alone; write "
                f"{where}.values=head, or {where}.value_clip=null"
            )
        if self.value_clip_ratio != 1:
            problems.append(
                f"{where}.value_clip finds the share of the values' range that is kept, which "
                f"{where}.value_clip_ratio={self.value_clip_ratio} sets; write {where}.value_clip_ratio=1.0, or "
                f"{where}.value_clip=null"
            )
        return problems

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

    def final_problems(self, where: str) -> list[str]:
        """What is wrong where a sampler stores final tokens once, block by block, and no forward has all of them."""
        if self.whole_sequence and not self.stored_only:
            return [
                f"{where}.center, {where}.keys=channel and {where}.recent look at all tokens of a sequence, but this "
                f"sampler computes them block by block; write {where}.when=commit, which looks at those stored "
                f"together, or {where}=per_head without them"
            ]
        if self.recent:
            return [
                f"{where}.recent={self.recent} leaves the last tokens in 16 bit, but this sampler stores each block "
                f"once, so that those of every block would stay so; write {where}.recent=0"
            ]
        return []

    def _gain_problems(self, where: str, context: Context) -> list[str]:
        problems = []
        if self.keys is None:
            problems.append(
                f"{where}.fold_gain=true is for keys that are rounded, but {where}.keys=null leaves them alone; "
                f"write {where}.keys=token, or {where}.fold_gain=false"
            )
        if not context.arch.head_norm:
            problems.append(
                f"{where}.fold_gain=true moves gains from the norm of keys into that of queries, but this model, of "
                f"family {context.arch.family}, has no such norms; write {where}.fold_gain=false"
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
        if context.arch.head_norm:
            problems.append(
                f"{where}.before_bias=true rounds keys before their bias is added, but this model, of family "
                f"{context.arch.family}, normalises keys behind it; write {where}.before_bias=false"
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
            elif block and share == "static":
                problems.append(
                    f"{where}.values=static has a fixed range per channel, but {bits.format} shares one among {block} "
                    f"channels of a token; write {where}.values=token, or bits.activation.format=int"
                )
            elif block and width % block:
                problems.append(
                    f"{where}.{name}={share}: {width} channels cannot be cut into the blocks of {block} in which "
                    f"{bits.format} shares a scale; write {where}.{name}=null, or bits.kv.{name}=16"
                )
        return problems


def fold_gain(block: Block) -> None:
    """Divide large gains of the norm of keys by a power of two, and multiply those of queries by it.

    Channels i and i + E/2 make a pair, which rope turns together; both are divided by s = max(1, g / median), where g
    is the larger |gain| of the two and the median (the lower one) that of all E channels, rounded to the nearest power
    of two in log2. So attention is the same to the bit in every dtype, while a channel that the norm makes large in
    every key, which takes most of a grid per token, comes down to the others. SmoothAttention (QServe,
    arXiv:2405.04532) with the factors of DLLMQuaRot (github.com/Eugene13112001/DLLMQuaRot, `smooth_qk.py`), which found
    the effect in 2-bit keys of LLaDA2.0-mini; its default goes half the way, s^(1/2), ours all of it.
    """
    queries, keys = (getattr(block, norm) for norm in ("q_norm", "k_norm"))
    gains = wide(keys.weight.detach()).abs().clamp(min=1e-8)
    pairs = gains.view(2, -1).amax(0) / gains.median()
    s = pairs.clamp(min=1).log2().round().exp2().repeat(2).to(keys.weight.dtype)
    keys.weight = nn.Parameter(keys.weight.detach() / s, requires_grad=False)
    queries.weight = nn.Parameter(queries.weight.detach() * s, requires_grad=False)


def _rounded(grid: Grid, share: str, v: Tensor, ratio: float) -> Tensor:
    """Values [1, K, T, E] on grids of their own, one per token or per token and head."""
    return shared(share, v, lambda rows: grid.fake(rows, clip_ratio=ratio))
