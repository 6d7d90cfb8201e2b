"""Masked blocks of many requests, put together to go through a model that writes block by block.

A line is a text that is final and behind it blocks of pieces that follow this text, or a part of it, each with masks of
its own. One forward computes the text once and all of these blocks beside it (`layout.beside`), each as a sampler
computes it over what it has stored; what final tokens predict is read from the text itself.

A line has up to WIDE times as many tokens as its text, or SHORT: attention grows with the square of them, and a text
that the next line computes again is then a small part. A batch is some lines, padded on the right.

Shapes: B lines, T columns, C tokens of a text, W tokens of a block, n scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dqx.diffusion.batches import Part, SequenceGroup
from dqx.diffusion.factorization import Factorization
from dqx.diffusion.likelihood import true_log_probs
from dqx.diffusion.samplers.base import at_least_float32
from dqx.models.architecture import Attention
from dqx.models.layout import beside, horizon
from dqx.models.transformer import MaskedDiffusionTransformer

WIDE, SHORT = 4, 256


def widest(text: int) -> int:
    """The most tokens of a line with a text of so many."""
    return max(WIDE * text, SHORT)


def most(text: int, wanted: int, *, alone: bool) -> int:
    """The most tokens of a line where so many are wanted; `alone` in a batch it has no less beside its text than in it,
    which would otherwise be computed again for a few blocks."""
    return max(min(wanted, widest(text)), 2 * text if alone else 0)


def block_batches(groups: Iterable[SequenceGroup], tokens: Callable[[], int], block: int) -> Iterator[list[Part]]:
    """Rows of consecutive groups: as many as have at most `tokens()`, padding counted; of one line more (`most`)."""
    batch: list[Part] = []
    text = torch.zeros(0, dtype=torch.long)  # of the line that is being filled
    n = width = longest = 0  # lines of the batch, tokens of the last one and of the longest one
    for group in groups:
        own, each, start = group.piece.text, block if group.piece.by_final is None else 0, 0
        while start < len(group.rows):
            left, count = len(group.rows) - start, 0
            if n and len(own) <= len(text) and own.equal(text[: len(own)]):
                count = _room(left, each, most(len(text), tokens() // n, alone=n == 1) - width)
            if not count:
                if n and (n + 1) * max(longest, len(own) + each) > tokens():
                    yield batch
                    batch, n, longest = [], 0, 0
                text, n, width = own, n + 1, len(own)
                count = max(1, _room(left, each, most(len(text), tokens() // n, alone=n == 1) - width))
            batch.append(Part(group, start, start + count, line=n))
            start, width = start + count, width + count * each
            longest = max(longest, width)
    if batch:
        yield batch


def _room(rows: int, each: int, free: int) -> int:
    """How many of so many rows, of `each` tokens, fit into `free` tokens."""
    return min(rows, max(0, free) // each) if each else rows


class Line:
    """A text and the blocks behind it, as they are added."""

    def __init__(self, text: Tensor, final: Attention):
        positions = torch.arange(len(text))
        self.width = len(text)
        self.columns = [torch.stack((text, positions, torch.zeros_like(text), horizon(positions, final)))]

    def add(self, blocks: Tensor, start: int) -> None:
        """Behind all others, blocks [U, W] whose first token stands at position `start`."""
        rows, size = blocks.shape
        column = torch.arange(rows * size)
        copy = 1 + self.width + column // size * size  # the first column of a block names it
        positions = start + column % size
        self.columns.append(torch.stack((blocks.flatten(), positions, copy, torch.full_like(column, start))))
        self.width += len(column)

    def padded(self, width: int) -> Tensor:
        """Ids, positions, numbers of copies, and what is seen of the text, with padding that sees itself: [4, T]."""
        added = torch.arange(self.width, width)
        nothing = torch.zeros_like(added)
        return torch.cat((*self.columns, torch.stack((nothing, nothing + 1, 1 + added, nothing))), dim=1)


@dataclass(frozen=True)
class Scored:
    """What a batch gave: of each part its pairs [n] that have scored tokens, one by one, and the log-probabilities of
    these [n]; and what it took, lines and their tokens."""

    pairs: list[Tensor]
    log_probs: list[Tensor]
    n_lines: int
    n_tokens: int


def block_log_probs(model: MaskedDiffusionTransformer, batch: Sequence[Part], factorization: Factorization) -> Scored:
    """Run a batch. Raises FloatingPointError on NaN."""
    found, at, tokens, pairs = [], [], [], []
    for number, (_, parts) in enumerate(groupby(batch, key=lambda part: part.line)):
        alike = list(parts)
        line = Line(max((part.group.piece.text for part in alike), key=len), factorization.final)
        for part in alike:
            group, piece = part.group, part.group.piece
            low, high = torch.searchsorted(group.row, torch.tensor([part.start, part.stop])).tolist()
            pair, token = group.scored[low:high].nonzero(as_tuple=True)
            column = len(piece.prefix) + token - 1  # of what predicts it, in the text
            if piece.by_final is None:
                inside = (column + 1 - int(factorization.shift) - piece.start).clamp(min=0)
                column = line.width + (group.row[pair + low] - part.start) * factorization.block + inside
                rows = group.rows[part.start : part.stop]
                line.add(factorization.blocks(piece, rows, model.arch.mask_token_id), piece.start)
            at.append(torch.stack((torch.full_like(column, number), column)))
            tokens.append(group.tokens[pair + low, token])
            pairs.append(pair + low)
        found.append(line)
    width = max(line.width for line in found)
    ids, positions, copy, before = torch.stack([line.padded(width) for line in found], dim=1)
    line_of, column_of = torch.cat(at, dim=1)
    where = torch.zeros(ids.shape, dtype=torch.bool)
    where[line_of, column_of] = True
    picked = (where.flatten().cumsum(0).view(where.shape) - 1)[line_of, column_of]
    device = model.device
    layout = beside(positions.to(device), copy.to(device), before.to(device))
    logits = at_least_float32(model.head_rows(ids.to(device), where, layout))
    log_probs = true_log_probs(logits, torch.cat(tokens), picked).split([len(p) for p in pairs])
    return Scored(pairs, list(log_probs), len(found), sum(line.width for line in found))
