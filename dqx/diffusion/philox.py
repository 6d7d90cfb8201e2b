"""Philox4x32-10, a counter-based generator of random numbers, in integer arithmetic of plain tensors.

Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3" (the Random123 library), section 3.3.
Ten rounds of multiplications and exclusive ors turn a counter of four words and a key of two into four words that look
random. Nothing is remembered from one number to the next, and integers are the same on every device, so the
numbers are too, in any order and in batches of any size.

A word is an integer of 32 bits, 0 ... 2^32 - 1, held in int64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF

Words4 = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> Words4:
    """Four random words from the four of `counter` and the two of `key`, all of shapes that broadcast together."""
    a, b, c, d = (word.clone(memory_format=torch.contiguous_format) for word in torch.broadcast_tensors(*counter))
    for turn in range(ROUNDS):
        first, second = ((word + turn * step) & WORD for word, step in zip(key, KEY_STEPS, strict=True))
        (high_a, a), (high_c, c) = (product(m, x) for m, x in zip(MULTIPLIERS, (a, c), strict=True))
        b = high_c.bitwise_xor_(b).bitwise_xor_(first).bitwise_and_(WORD)
        d = high_a.bitwise_xor_(d).bitwise_xor_(second).bitwise_and_(WORD)
        a, b, c, d = b, c, d, a
    return a, b, c, d


def product(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of multiplier * x; above the word the high one has bits that mean nothing.

    x (multiplier - 2^32) fits into int64 for multipliers of 2^31 and more, and lacks just x in the high word.
    """
    missing = x * (multiplier - WORD - 1)
    return (missing >> 32).add_(x), missing.bitwise_and_(WORD)


def uniforms(high: Tensor, low: Tensor) -> Tensor:
    """Numbers in [0, 1) of 53 bits, in float64, from pairs of random words."""
    return ((high >> 5) * 2**26 + (low >> 6)).to(torch.float64) * 2.0**-53
