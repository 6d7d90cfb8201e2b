"""Keys and values of tokens that are final, appended block by block: an exact cache for block-wise attention.

Where no token sees a later block, the keys and values of finished blocks never change again, so a forward of the next
block over what is stored gives what a forward of everything would give. Rows have different lengths, and each forward
says for each of its rows whether its keys and values are stored.

Shapes: N blocks, B rows, K key/value heads, C columns of the store, E head width, W columns fed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dqx.models.architecture import Attention
from dqx.models.kv_cache import Pair
from dqx.models.layout import WHOLE, Layout


@dataclass
class CommitCache:
    """store: [N, 2, B, K, C, E], keys after rope and values; of row b the first `lengths[b]` columns are filled."""

    store: Tensor
    lengths: list[int]

    def feed(
        self,
        real: Tensor,
        attention: Sequence[Attention],
        stored: Sequence[bool],
        rows: Sequence[int] | None = None,
        at: Sequence[int | None] | None = None,
    ) -> Feed:
        """For a forward of new tokens; `real` [B, W], on the CPU, is False at padding, on the right.

        The tokens of row `rows[b]` (None: b) follow those it has stored, see all of these, and see each other as
        `attention[b]` says. Their keys and values are appended where `stored[b]`, once `commit` is called. With `at[b]`
        the tokens take the place of stored ones from that column on, and see the others, also those behind them.
        Raises ValueError where the store has no room for them.
        """
        widths, rows = real.sum(1).tolist(), list(range(len(real)) if rows is None else rows)
        places = [None] * len(rows) if at is None else list(at)
        starts = [self.lengths[row] if place is None else place for row, place in zip(rows, places, strict=True)]
        for length, width, keep in zip(starts, widths, stored, strict=True):
            if keep and length + width > self.store.shape[-2]:
                raise ValueError(f"the store holds {self.store.shape[-2]} tokens of a row; {length + width} were asked")
        return Feed(self, real, list(attention), list(stored), widths, rows, starts)


@dataclass
class Feed:
    """One forward over a `CommitCache`: `layout` is that of its columns, `update` serves the blocks."""

    cache: CommitCache
    real: Tensor  # [B, W]
    attention: list[Attention]
    stored: list[bool]
    widths: list[int]
    rows: list[int]
    starts: list[int]  # where each row's new tokens stand
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        device = self.cache.store.device
        width = self.real.shape[1]
        lengths = [self.cache.lengths[row] for row in self.rows]
        self.filled = max(lengths, default=0)
        start = torch.tensor(self.starts)[:, None]
        positions = start + torch.arange(width)
        column, end = torch.arange(self.filled), start + torch.tensor(self.widths)[:, None]
        before = (column < torch.tensor(lengths)[:, None]) & ~((column >= start) & (column < end))  # [B, C]
        size = torch.tensor([WHOLE if a.block is None else a.block for a in self.attention])[:, None]
        number = positions // size
        among = (number[:, None, :] <= number[:, :, None]) & self.real[:, None, :]
        among |= torch.eye(width, dtype=torch.bool)  # a padded column sees itself: softmax over nothing is NaN
        mask = torch.cat((before[:, None, :].expand(-1, width, -1), among), dim=2)
        positions = positions.where(self.real, 1)
        everywhere = bool(mask.all())
        self.layout = Layout(positions.to(device), None if everywhere else mask[:, None].to(device))
        kept = [b for b, keep in enumerate(self.stored) if keep]
        index = [(self.rows[b], self.starts[b] + i, b, i) for b in kept for i in range(self.widths[b])]
        self.places = torch.tensor(index, dtype=torch.long).T.to(device) if index else None
        every = self.rows == list(range(self.cache.store.shape[2]))
        self.index = None if every else torch.tensor(self.rows, device=device)

    def update(self, block: int, k: Tensor, v: Tensor, stored: Callable[[], Pair] | None = None) -> Pair:
        """From the new columns' keys and values [B, K, W, E] to those of all that they see, the stored ones first.

        What is stored is what `stored` gives, or the same.
        """
        old = self.cache.store[block, ..., : self.filled, :]
        old = old if self.index is None else old.index_select(1, self.index)
        both = torch.cat((old[0], k), dim=2), torch.cat((old[1], v), dim=2)
        if self.places is not None:
            row, to, own, column = self.places
            for kept, new in zip(self.cache.store[block], (k, v) if stored is None else stored(), strict=True):
                kept[row, :, to] = new[own, :, column]
        return both

    def commit(self) -> None:
        """Count what this forward has stored. Without it, what it wrote is behind the end of every row."""
        for row, start, width, keep in zip(self.rows, self.starts, self.widths, self.stored, strict=True):
            if keep:
                self.cache.lengths[row] = max(self.cache.lengths[row], start + width)
