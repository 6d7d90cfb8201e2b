"""How much of the range of a block's values is kept: what errs least on calibration text, by the attention tokens get.

DLLMQuant (Xu and Yang 2025, arXiv:2508.14090, interaction-aware activation quantization): what 4-bit activations cost
in attention comes from its product with the values, and an error of a value counts as much as the queries attend to its
token. The scale of the values is therefore searched for the least sum of `attention received * |Q(v) - v|^2`.
There is no code of the authors. In a community's re-implementation all tokens share one fixed range per channel, which
counts tokens by the mean attention of all heads: `values: static` here, where every channel keeps a share of its own
and values of a head count by the attention of the queries that read them. Where every token has a grid of its own at
run time (`values: token` or `head`), the search is for the share of these ranges that is kept, one for each block;
there tokens do not compete for a range, and attention decides little. Softmax itself stays as it is, as there.

Queries, keys and values are those of the block before it is rounded, on the input that the quantized blocks before it
give. Where tokens have weights (`token_weight.py`), those of queries weigh what they attend to.

T tokens, H query heads, K key and value heads, E head width, R shares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dqx.formats.integers import wide
from dqx.models.transformer import Block
from dqx.quant.clip import search_problems, steps
from dqx.quant.protocols import Context, choice_problems

if TYPE_CHECKING:
    from dqx.quant.stream import Stream

IMPORTANCE = ("attention", "equal")
SCORES = 2**24  # attention scores at a time

#: Values [1, K, T, E] rounded with a share of their ranges kept.
Rounds = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class ValueClip:
    """The first share `1 - i/n_grid` of the ranges of a block's values with the least weighted squared error."""

    importance: str = "attention"  # how much attention a token gets; equal: all tokens count alike
    n_grid: int = 20
    max_shrink: float = 0.8  # i < max_shrink * n_grid

    def share(self, block: Block, stream: Stream, rounds: Rounds) -> float:
        """One share for all values of `block`, on the sequences of `stream`."""
        errors = self._errors(block, stream, rounds).sum((1, 2)).tolist()
        return self._shares[errors.index(min(errors))]

    def shares(self, block: Block, stream: Stream, rounds: Rounds) -> Tensor:
        """A share for every head and channel [K, 1, E]."""
        first = self._errors(block, stream, rounds).argmin(0)
        return torch.tensor(self._shares, dtype=torch.float64, device=first.device)[first][:, None]

    @property
    def _shares(self) -> list[float]:
        return [1 - i / self.n_grid for i in range(steps(self.n_grid, self.max_shrink))]

    def _errors(self, block: Block, stream: Stream, rounds: Rounds) -> Tensor:
        """Weighted squared errors by share, head and channel [R, K, E], in float64."""
        total: Tensor | None = None
        for i in range(len(stream.inputs)):
            q, k, v = stream.heads(block, i)
            weight = stream.weight(i)
            if self.importance == "attention":
                counts = attention_received(q, k, weight, stream.tables(i)[1])
            else:
                counts = wide(v[:0]).new_ones(v.shape[1:3]) if weight is None else weight.expand(v.shape[1:3])
            changes = ((wide(rounds(v, share)) - wide(v))[0] for share in self._shares)
            squares = [(change.square() * counts[..., None]).sum(1, dtype=torch.float64) for change in changes]
            total = torch.stack(squares) if total is None else total + torch.stack(squares)
        assert total is not None
        return total

    def problems(self, where: str, context: Context) -> list[str]:
        problems = choice_problems(f"{where}.importance", self.importance, IMPORTANCE)
        return problems + search_problems(where, self.n_grid, self.max_shrink)


def value_range(block: Block, stream: Stream) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of every head and channel over all tokens, both [K, 1, E]."""
    lo, hi = zip(
        *(torch.aminmax(wide(stream.heads(block, i)[2][0]), dim=1, keepdim=True) for i in range(len(stream.inputs))),
        strict=True,
    )
    return torch.stack(lo).amin(0), torch.stack(hi).amax(0)


def attention_received(q: Tensor, k: Tensor, weight: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """How much the queries [1, H, T, E] attend to each token: columns of softmax summed up, by key head [K, T].

    The mean over the query heads that share a key head; over tokens its mean is 1. `weight` [1, T] are those of the
    queries, `mask` [1, 1, T, T] says which token (row) sees which.
    """
    heads, tokens = q.shape[1:3]
    shared = heads // k.shape[1]
    keys = wide(k[0]).repeat_interleave(shared, dim=0).transpose(1, 2) * q.shape[-1] ** -0.5
    received = keys.new_zeros(heads, tokens)
    at_a_time = max(1, SCORES // (heads * tokens))
    for queries in torch.arange(tokens, device=q.device).split(at_a_time):
        scores = wide(q[0, :, queries]) @ keys
        if mask is not None:
            scores = scores.masked_fill(~mask[0, :, queries], -torch.inf)
        rows = scores.softmax(-1)
        received += (rows if weight is None else rows * weight[0, queries, None].to(rows.dtype)).sum(1)
    return received.view(-1, shared, tokens).mean(1)
