"""The one transformer behind every model family: RMSNorm, rope, grouped heads, gated MLP, attention as it is told.

Families differ in their `Architecture` and in the names of tensors (`dqx/models/families`). One with other linears
brings a subclass of `Block`.

Shapes: B batch, T tokens, D hidden, H heads, K key/value heads, E head width, F MLP width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pkgutil import resolve_name

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqx.common.heartbeat import beat
from dqx.models.architecture import Architecture
from dqx.models.commit_cache import CommitCache, Feed
from dqx.models.kv_cache import KVCache, Pair
from dqx.models.layout import Layout
from dqx.models.rope import Rope, rope_tables
from dqx.models.tokens import Tokens

#: From the keys and values [B, K, W, E] of the columns computed to those of all columns [B, K, T, E]; with what gives
#: those that a cache stores in their place, where these are others; it may be told of other `Tokens`.
Reuse = Callable[[Tensor, Tensor, Callable[..., Pair] | None], Pair]


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, the statistics in float32 whatever the dtype of x [..., D].

    No checkpoint has a bias; a correction may add one, `bias` [D].
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias: nn.Parameter | None = None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        normed = self.weight * wide.to(x.dtype)
        return normed if self.bias is None else normed + self.bias


class Unchanged(nn.Identity):
    """An empty place of `Block.sequence`."""

    def forward(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        return x


class Block(nn.Module):
    """One transformer block. Its linears are attributes named by role; here those of a dense transformer.

    Quantization methods may put modules of their own in three places, which hold nothing in a checkpoint:
    `inputs[site]` transforms the input [B, T, I] of a site's linears, and `heads` the queries, keys and values
    [B, H, T, E] (`heads["q"]`, `["k"]` after rope, `["v"]`) before keys and values are repeated for grouped heads.
    Both act on each token by itself. `sequence` may look at all of them: its modules are called with the keys before
    rope (`sequence["projected"]`), or with keys and values behind `heads` (`["k"]`, `["v"]`), and with the `Tokens`
    computed (None: all columns, none of them padding). One that does look at other tokens says so, `whole_sequence =
    True`: what it finds in a forward of all columns serves those of some. `stored` may hold modules for the same three
    parts: what a cache stores passes through them in place of those in `sequence`, what attention reads of the columns
    computed does not.
    """

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear

    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        for role in arch.roles:
            bias = arch.qkv_bias and role in ("q", "k", "v")
            self.add_module(role, nn.Linear(arch.in_features(role), arch.out_features(role), bias=bias))
        self.attn_norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.mlp_norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.q_norm, self.k_norm = (
            RMSNorm(arch.head_size, arch.norm_eps) if arch.head_norm else nn.Identity() for _ in range(2)
        )
        self.inputs = nn.ModuleDict({site: nn.Identity() for site in arch.sites})
        self.heads = nn.ModuleDict({part: nn.Identity() for part in ("q", "k", "v")})
        self.sequence = nn.ModuleDict({part: Unchanged() for part in ("projected", "k", "v")})
        self.stored = nn.ModuleDict()

    def linears(self) -> dict[str, nn.Module]:
        """The block's linears by role, in data-flow order."""
        return {role: getattr(self, role) for role in self.arch.roles}

    @property
    def whole_sequence(self) -> bool:
        """Whether anything here looks at all tokens of a sequence besides attention."""
        return any(getattr(module, "whole_sequence", False) for module in self.sequence.values())

    def attention(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor | None,
        reuse: Reuse | None = None,
        read: Tensor | None = None,
        tokens: Tokens | None = None,
    ) -> Tensor:
        """The attention sublayer on its normalised input x [B, T, D]; every token attends to every token, or to those
        that `mask` [B, 1, T, T] marks.

        With `reuse`, x are some of the columns [B, W, D], and they attend to those it adds. With `read` [B, R], the
        output is that of these columns alone [B, R, D]. `tokens` are for `sequence`.
        """
        x = self.inputs["attn_in"](x)
        asked = x if read is None else pick(x, read)
        q, k, v = (
            getattr(self, role)(columns).unflatten(-1, (-1, self.arch.head_size)).transpose(1, 2)
            for role, columns in (("q", asked), ("k", x), ("v", x))
        )
        own = rope if read is None else rope.at(read)
        q, fresh = self.heads["q"](own.query(self.q_norm(q))), (self.k_norm(k), v, rope, tokens)
        k, v = self.keys_values(self.sequence, *fresh)
        if reuse is not None:
            through = {**self.sequence, **self.stored}

            def stored(others: Tokens | None = tokens) -> Pair:
                return self.keys_values(through, *fresh[:3], others)

            k, v = reuse(k, v, stored if self.stored else None)
        if read is not None and mask is not None:
            mask = pick(mask.expand(len(read), -1, -1, -1), read[:, None])
        groups = self.arch.n_heads // self.arch.n_kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=False)
        return self.o(self.inputs["attn_out"](mixed.transpose(1, 2).flatten(2)))

    def keys_values(
        self, through: nn.ModuleDict | Mapping[str, nn.Module], k: Tensor, v: Tensor, rope: Rope, tokens: Tokens | None
    ) -> Pair:
        """Keys after rope and values [B, K, T, E], from those that the linears give, through the modules of
        `sequence` or `stored`."""
        k = self.heads["k"](rope.key(through["projected"](k, tokens)))
        return through["k"](k, tokens), through["v"](self.heads["v"](v), tokens)

    def mlp(self, x: Tensor) -> Tensor:
        """The gated MLP on its normalised input x [B, T, D]."""
        x = self.inputs["mlp_in"](x)
        return self.down(self.inputs["mlp_out"](F.silu(self.gate(x)) * self.up(x)))

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor | None = None,
        reuse: Reuse | None = None,
        read: Tensor | None = None,
        tokens: Tokens | None = None,
    ) -> Tensor:
        beat()
        mixed = self.attention(self.attn_norm(x), rope, mask, reuse, read, tokens)
        x = mixed + (x if read is None else pick(x, read))
        return x + self.mlp(self.mlp_norm(x))


def block_of(arch: Architecture) -> Block:
    """A new block of the class that the architecture names."""
    block: Block = resolve_name(arch.block)(arch)
    return block


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """The `rows` [..., R] of x [..., T, D], leading dimensions broadcast: [..., R, D]."""
    return x.gather(-2, rows[..., None].expand(*x.shape[:-2], -1, x.shape[-1]))


def compose(places: nn.ModuleDict, name: str, module: nn.Module) -> None:
    """Put `module` behind what is at `places[name]` already (`block.inputs`, `block.heads`)."""
    there = places[name]
    places[name] = module if isinstance(there, nn.Identity) else nn.Sequential(there, module)


class MaskedDiffusionTransformer(nn.Module):
    """A bidirectional mask predictor: token ids in, one row of logits per position out; row i always predicts token i,
    so that samplers and likelihoods need not know of the logit shift (Dream)."""

    unfinished = False  # whether it is being quantized, or an attempt has failed on the way

    def __init__(self, arch: Architecture):
        super().__init__()
        self.arch = arch
        embeddings = torch.empty(arch.vocab_size, arch.hidden_size)
        if not embeddings.is_meta:  # drawing on the meta device would import torch._dynamo, which takes a second
            embeddings.normal_()
        self.embed = nn.Embedding(arch.vocab_size, arch.hidden_size, _weight=embeddings)
        self.blocks = nn.ModuleList(block_of(arch) for _ in range(arch.n_blocks))
        self.norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.head = nn.Linear(arch.hidden_size, arch.vocab_size, bias=False)
        if arch.tied_head:
            self.head.weight = self.embed.weight

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def context(
        self, ids: Tensor, attention_mask: Tensor | None = None, columns: Tensor | None = None
    ) -> tuple[Rope, Tensor | None]:
        """What every block needs besides its input: rope tables, and a [B, 1, T, T] mask or None.

        `attention_mask` [B, T] marks real tokens with 1; see `Layout.of`. With `columns` [B, W], all of them real, the
        tables are theirs, and the mask says what they attend to.
        """
        layout = Layout.of(ids, attention_mask, self.arch.attention)
        return self.tables(layout if columns is None else layout.at(columns))

    def tables(self, layout: Layout) -> tuple[Rope, Tensor | None]:
        """`context` for a layout."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return rope_tables(self.arch, layout.positions, wide), layout.mask

    def residual_states(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | Feed | None = None,
        read: Tensor | None = None,
        layout: Layout | None = None,
    ) -> Iterator[Tensor]:
        """Yield the input of each block [B, T, D], then the output of the last one, of the columns `read` [B, R] alone.

        With a `KVCache`, of the columns that it names [B, W, D]: they attend to the keys and values it holds of the
        others. With a `Feed` the ids are new ones [B, W], behind those stored. `layout` takes the place of the
        architecture's own attention and of positions from 0.
        Raises ValueError where a block's `sequence` looks at all tokens, and these are new ones or laid out otherwise.
        """
        columns = cache.columns if isinstance(cache, KVCache) else None
        real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if isinstance(cache, Feed):
            layout, real = cache.layout, cache.real.to(ids.device)
        if layout is not None and any(block.whole_sequence for block in self.blocks):
            raise ValueError(
                "keys or values are rounded by what all tokens of a sequence are, but this model's sampler "
                "computes them block by block; round them per token (method.kv=per_token)"
            )
        rope, mask = self.context(ids, attention_mask, columns) if layout is None else self.tables(layout)
        x = self.embed(ids if columns is None else ids.gather(1, columns))
        for i, block in enumerate(self.blocks):
            yield x
            reuse = None if cache is None else partial(cache.update, i)
            tokens = Tokens(real, columns, cache.statistics[i] if isinstance(cache, KVCache) else None)
            last = i == len(self.blocks) - 1
            x = block(x, rope, mask, reuse, read if last else None, tokens)
        yield x

    def empty_cache(self, rows: int, length: int) -> KVCache:
        """A cache for `rows` sequences of `length` tokens, to be filled by a forward."""
        arch = self.arch
        shape = (arch.n_blocks, 2, rows, arch.n_kv_heads, length, arch.head_size)
        store = torch.empty(shape, dtype=self.dtype, device=self.device)
        return KVCache(store, tuple(dict[str, Tensor]() for _ in range(arch.n_blocks)))

    def empty_store(self, rows: int, length: int) -> CommitCache:
        """A store for the final tokens of `rows` sequences, `length` of each at most."""
        store = self.empty_cache(rows, length).store  # zeros: what is masked is multiplied by 0, which NaN survives
        return CommitCache(store.zero_(), [0] * rows)

    def hidden_states(
        self, ids: Tensor, attention_mask: Tensor | None = None, layout: Layout | None = None
    ) -> Iterator[Tensor]:
        """Yield the input of each block [B, T, D], then the output of the final norm."""
        for i, x in enumerate(self.residual_states(ids, attention_mask, layout=layout)):
            yield x if i < len(self.blocks) else self.norm(x)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, layout: Layout | None = None) -> Tensor:
        """Logits [B, T, V] for ids [B, T]; row i predicts token i. `layout` as in `residual_states`."""
        for x in self.hidden_states(ids, attention_mask, layout):  # noqa: B007  the last is the final norm's output
            pass
        logits = self.head(x)
        return shift_logits(logits) if self.arch.logit_shift else logits

    def logits_where(
        self, ids: Tensor, where: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Logits [n, V] of the positions marked in `where` [B, T], row by row: `forward(ids, attention_mask)[where]`.

        Where `where` lies on the CPU, nothing waits for the device.

        The last block gives its output, but for keys and values, only from the first to the last column that predicts
        one of these positions in its row; the final norm and the head see only the columns that do. A forward with a
        cache that names columns computes those alone, adjacent ones, among which must be those that predict `where`.
        """
        row, column = where.nonzero(as_tuple=True)
        if self.arch.logit_shift:  # see `shift_logits`
            column = (column - 1).clamp(min=0)
        computed = None if cache is None else cache.columns
        read = span(row, column, len(ids)).to(ids.device) if computed is None else None
        row, column = torch.stack((row, column)).to(ids.device)
        states = self.residual_states(ids, attention_mask, cache, read)
        for x in states:  # noqa: B007  the last one leaves the last block
            pass
        first = computed if read is None else read
        assert first is not None
        return self.head(self.norm(x[row, column - first[row, 0]]))

    def head_rows(self, ids: Tensor, where: Tensor, seen: Feed | Layout) -> Tensor:
        """The head's output [n, V] at the columns marked in `where` [B, W], on the CPU, for tokens ids [B, W]: new
        ones of a `Feed`, or all of a `Layout`.

        Nothing is shifted: what a row predicts, and what it has `seen`, is the sampler's matter.
        """
        row, column = where.nonzero(as_tuple=True)
        read = span(row, column, len(ids))
        feed, layout = (seen, None) if isinstance(seen, Feed) else (None, seen)
        states = self.residual_states(ids, None, feed, read.to(ids.device), layout)
        for x in states:  # noqa: B007  the last one leaves the last block
            pass
        row, column = torch.stack((row, column - read[row, 0])).to(ids.device)
        return self.head(self.norm(x[row, column]))


def span(row: Tensor, column: Tensor, rows: int) -> Tensor:
    """Adjacent columns [B, R] that hold column[i] of row[i] for every i, of B `rows`. Short ones repeat their last."""
    first, last = (
        torch.zeros(rows, dtype=torch.long, device=row.device).scatter_reduce(0, row, column, how, include_self=False)
        for how in ("amin", "amax")
    )
    width = int((last - first).max()) + 1 if len(row) else 1
    return torch.minimum(first[:, None] + torch.arange(width, device=row.device), last[:, None])


def shift_logits(logits: Tensor) -> Tensor:
    """Dream's convention on [B, T, V]: the prediction for token i is read at i-1; token 0 keeps row 0."""
    return torch.cat((logits[:, :1], logits[:, :-1]), dim=1)


def initialise(model: MaskedDiffusionTransformer, generator: torch.Generator) -> None:
    """Fresh weights for training: N(0, 1/fan_in) linears, smaller into the residual stream, unit embeddings."""
    depth = math.sqrt(2 * model.arch.n_blocks)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.startswith("embed"):
                p.normal_(0, 1, generator=generator)
            else:
                into_residual = name.endswith(("o.weight", "down.weight"))
                p.normal_(0, p.shape[1] ** -0.5 / (depth if into_residual else 1), generator=generator)
