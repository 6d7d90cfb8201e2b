"""Where the tokens of a forward stand, and which of them see which.

Shapes: B batch, T tokens, L tokens of a text, C copies, W columns of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dqx.models.architecture import Attention

WHOLE = 2**40  # the length of a block that holds every position


@dataclass(frozen=True)
class Layout:
    """Positions [B, T], from 0, and a mask [B, 1, T, T], True where a token (row) sees another; None: everywhere.

    B may be 1 where all rows are alike.
    """

    positions: Tensor
    mask: Tensor | None

    @staticmethod
    def of(ids: Tensor, real: Tensor | None, attention: Attention) -> Layout:
        """Of sequences ids [B, T]; `real` [B, T] marks real tokens with 1, the others are padding (None: none is).

        A pair attends iff both are real and `attention` allows it. Positions count real tokens only, and padded ones
        get 1 (Dream's convention).
        """
        length, device = ids.shape[1], ids.device
        if real is None:
            positions = torch.arange(length, device=device)[None]
            return Layout(positions, None if attention.block is None else sees(positions, attention)[:, None])
        real = real.bool()
        positions = (real.long().cumsum(-1) - 1).masked_fill(~real, 1)
        itself = torch.eye(length, dtype=torch.bool, device=device)  # softmax over nothing is NaN
        pairs = real[:, None, :, None] & real[:, None, None, :]
        if attention.block is not None:
            pairs = pairs & sees(positions, attention)[:, None]
        return Layout(positions, pairs | itself)

    def at(self, columns: Tensor) -> Layout:
        """Of the columns [B, W] alone, which see what they saw: the mask becomes [B, 1, W, T]."""
        rows = len(columns)
        positions = self.positions.expand(rows, -1).gather(1, columns)
        if self.mask is None:
            return Layout(positions, None)
        mask = self.mask.expand(rows, -1, -1, -1)
        index = columns[:, None, :, None].expand(-1, 1, -1, mask.shape[-1])
        return Layout(positions, mask.gather(2, index))


@dataclass(frozen=True)
class Passes:
    """The passes of a sampler over its store, one behind the other in one sequence [1, T]: `table` [1, 4, T] has of
    each token

    0. its position;
    1. the number of its pass, ascending;
    2. the pass from which on it is not stored any more, 0 where it never is;
    3. the block size of the attention among the tokens of its pass, `WHOLE` for full attention.

    A token sees the tokens of its own pass by that attention, and what was stored before that pass and still is.
    """

    table: Tensor

    @property
    def layout(self) -> Layout:
        """With which one forward computes what the sampler computes pass by pass."""
        return Layout(self.table[:, 0], (self.among | self.before)[:, None])

    @property
    def apart(self) -> Layout:
        """The layout where what is stored differs from what is computed: its mask [1, 1, T, 2T] has columns for the
        tokens as they are computed and then, once more, for them as they are stored."""
        return Layout(self.table[:, 0], torch.cat((self.among, self.before), dim=-1)[:, None])

    @property
    def among(self) -> Tensor:
        """Which tokens see which of their own pass [1, T, T]."""
        position, number, _, block = self.table.unbind(1)
        near = position[:, None, :] // block[:, :, None] <= (position // block)[:, :, None]
        return near & (number[:, None, :] == number[:, :, None])

    @property
    def before(self) -> Tensor:
        """Which tokens see which stored ones [1, T, T]."""
        _, number, until, _ = self.table.unbind(1)
        now = number[:, :, None]
        return (number[:, None, :] < now) & (now < until[:, None, :])

    @property
    def predicting(self) -> Tensor:
        """Where the logits of each token are read if row i - 1 predicts token i (`shift_logits`): the columns [1, T].

        The first token of a pass keeps its own row.
        """
        number = self.table[:, 1]
        column = torch.arange(number.shape[1], device=number.device)[None]
        return column - F.pad(number[:, 1:] == number[:, :-1], (1, 0)).long()


def sees(positions: Tensor, attention: Attention) -> Tensor:
    """Which positions [B, T] see which under `attention`: [B, T, T]."""
    block = attention.block
    if block is None:
        return torch.ones(1, 1, 1, dtype=torch.bool, device=positions.device)
    number = positions // block
    return number[:, None, :] <= number[:, :, None]


def beside(positions: Tensor, copy: Tensor, before: Tensor) -> Layout:
    """Of texts and, behind each, copies of some of their blocks in which any tokens may be masked. All are [B, T].

    The tokens of a text have `copy` 0, the others the number of their copy, whose tokens see each other and no other
    copy. Of its text a token sees what stands before position `before`. Padding is a copy of a number of its own.
    """
    text = copy == 0
    mask = text[:, None, :] & (positions[:, None, :] < before[:, :, None])
    mask |= (copy[:, None, :] == copy[:, :, None]) & ~text[:, None, :]
    return Layout(positions, mask[:, None])


def horizon(positions: Tensor, attention: Attention) -> Tensor:
    """The first position that a token at `positions` does not see under `attention`."""
    if attention.block is None:
        return torch.full_like(positions, torch.iinfo(positions.dtype).max)
    return (positions // attention.block + 1) * attention.block


def copies(length: int, block: int, stored: Attention, n: int, device: torch.device | str = "cpu") -> Layout:
    """Of a text of L tokens and behind it `n` copies in which any tokens may be masked: [1, L + nL].

    One forward of it computes what a sampler with a cache computes block by block: the text as it is stored, each token
    seeing others as `stored` says, and each copy's blocks of `block` tokens as they are denoised, each seeing itself in
    its copy and the text of the blocks before it (block diffusion, arXiv 2503.09573, section 3.2, with n = 1).
    """
    positions = torch.arange(length, device=device)
    blocks = -(-length // block)
    number = [positions // block + 1 + i * blocks for i in range(n)]
    return beside(
        positions.repeat(n + 1)[None],
        torch.cat([torch.zeros_like(positions), *number])[None],
        torch.cat([horizon(positions, stored), *[positions // block * block] * n])[None],
    )
