"""Keys and values kept from one forward to the next, so that a forward of some columns can attend to all of them.

What is kept are those of an earlier state of the sequence: with bidirectional attention an approximation, which
samplers offer as a choice (`dqx/diffusion/samplers/llada.py`). What quantization puts into a block acts on each token
by itself, so it acts here as it does without: what is kept is rounded and rotated already. What looks at all tokens
(`Block.sequence`) leaves what it found in them, means and ranges, with the cache when that is filled, and uses it again
where a forward computes some columns. What is put into `Block.stored` acts where a forward stores, and nowhere else.

Shapes: N blocks, B rows, K key/value heads, T columns, E head width, W columns of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # keys and values [B, K, W, E]


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every block for B rows of T columns.

    store: [N, 2, B, K, T, E], keys after rope and values, as `Block.stored` leaves them.
    statistics: of each block, those of its sequences by name, [B, K, G, E] with any G (`Tokens.statistic`).
    columns: [B, W], those that the next forward computes; None: all of them, which fills the cache.
    """

    store: Tensor
    statistics: tuple[dict[str, Tensor], ...]
    columns: Tensor | None = None

    def window(self, first: int | Sequence[int], stop: int | Sequence[int]) -> KVCache:
        """The same cache for a forward of the columns [first, stop) of each row; one number serves all rows.

        Narrower windows are padded by repeating their last column, which is computed twice to the same effect.
        """
        rows = self.store.shape[2]
        begin, end = (torch.tensor(limit).expand(rows)[:, None] for limit in (first, stop))
        columns = torch.minimum(begin + torch.arange(int((end - begin).max())), end - 1)
        return replace(self, columns=columns.to(self.store.device))

    def update(self, block: int, k: Tensor, v: Tensor, stored: Callable[[], Pair] | None = None) -> Pair:
        """The keys and values of all columns [B, K, T, E], from those of the computed ones, k and v [B, K, W, E].

        A forward of all columns stores k and v or, where it is given, what `stored` makes of them, and reads none of
        it. One of a window puts its own into the store, or beside `stored` in a copy, so that what was stored stays.
        """
        kept = self.store[block]
        if self.columns is None:
            for place, new in zip(kept, (k, v) if stored is None else stored(), strict=True):
                place.copy_(new)
            return k, v
        kept = kept if stored is None else kept.clone()
        for place, new in zip(kept, (k, v), strict=True):
            place.scatter_(2, self.columns[:, None, :, None].expand_as(new), new)
        return kept[0], kept[1]

    def take(self, rows: Sequence[int], length: int) -> KVCache:
        """The cache of some rows, the last `length` columns of each. Nothing is copied where that is all of it."""
        store = self.store[..., -length:, :]
        if list(rows) == list(range(store.shape[2])):
            return KVCache(store, self.statistics)
        index = torch.tensor(rows, device=store.device)
        kept = tuple({name: value[index] for name, value in of_block.items()} for of_block in self.statistics)
        return KVCache(store[:, :, index], kept)

    @staticmethod
    def join(caches: Sequence[KVCache]) -> KVCache:
        """The rows of all of them, the shorter ones padded on the left. A single one is not copied."""
        if len(caches) == 1:
            return KVCache(caches[0].store, caches[0].statistics)
        length = max(cache.store.shape[-2] for cache in caches)
        stores = [F.pad(cache.store, (0, 0, length - cache.store.shape[-2], 0)) for cache in caches]
        blocks = zip(*(cache.statistics for cache in caches), strict=True)
        kept = tuple(
            {name: stacked([found[name] for found in of_block]) for name in of_block[0]} for of_block in blocks
        )
        return KVCache(torch.cat(stores, dim=2), kept)


def stacked(statistics: Sequence[Tensor]) -> Tensor:
    """Statistics [B, K, G, E] of all rows, those with fewer groups padded behind their last: no token is in these."""
    groups = max(found.shape[2] for found in statistics)
    return torch.cat([F.pad(found, (0, 0, 0, groups - found.shape[2])) for found in statistics])
