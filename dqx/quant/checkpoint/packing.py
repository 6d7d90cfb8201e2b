"""Numbers of a few bits in bytes, and back.

The numbers lie one behind the other without gaps, lowest bits first: of numbers of b bits, bit j of number i is bit
i b + j of all, and bit n of all is bit n mod 8 of byte n div 8. So b bytes hold 8 numbers, and 8 numbers begin with a
byte. What is left of the last byte is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

BYTE = 8


def packed_size(count: int, bits: int) -> int:
    """The bytes of `count` numbers."""
    return -(-count * bits // BYTE)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """uint8 [bytes] of numbers [...], uint8 and below 2^bits; 1 to 8 bits."""
    flat = numbers.flatten()
    eights = torch.nn.functional.pad(flat, (0, -len(flat) % BYTE)).view(-1, BYTE)
    packed = eights.new_zeros(len(eights), bits)
    for i in range(BYTE):
        byte, shift = divmod(i * bits, BYTE)
        packed[:, byte] |= eights[:, i] << shift
        if shift + bits > BYTE:
            packed[:, byte + 1] |= eights[:, i] >> (BYTE - shift)
    return packed.flatten()[: packed_size(len(flat), bits)]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The numbers [count], uint8, in what `pack` made of them. Raises ValueError for another number of bytes."""
    if packed.dtype != torch.uint8 or packed.shape != (packed_size(count, bits),):
        raise ValueError(
            f"{count} numbers of {bits} bits take {packed_size(count, bits)} bytes, and there are {packed.nbytes}"
        )
    eights = torch.nn.functional.pad(packed, (0, -len(packed) % bits)).view(-1, bits)
    numbers = packed.new_empty(len(eights), BYTE)
    for i in range(BYTE):
        byte, shift = divmod(i * bits, BYTE)
        numbers[:, i] = eights[:, byte] >> shift
        if shift + bits > BYTE:
            numbers[:, i] |= eights[:, byte + 1] << (BYTE - shift)
    return numbers.bitwise_and_(2**bits - 1).flatten()[:count]
