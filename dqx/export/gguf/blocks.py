"""GGUF's block types: which grid each of them holds, and the bytes of codes, scales and offsets.

A block is a run of neighbouring weights of one row. Byte layouts are those of ggml, which `gguf.quants` reads too.

O = outputs, B = blocks per row, N = weights per block (32 or 256).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[Any]  # of uint8
Reals = NDArray[np.float32]


@dataclass(frozen=True)
class BlockType:
    """One type. `pack` makes the bytes [O, B * S] of codes [O, B, N], scales [O, B] and offsets [O, B].

    The offset is the zero point, or for types `with_minimum` the real number that is added.
    """

    name: str
    width: int  # N
    bits: int
    symmetric: bool
    pack: Callable[[Bytes, Reals, Reals], Bytes]
    with_minimum: bool = False


def half(x: Reals) -> Bytes:
    """The two bytes [O, B, 2] of numbers that float16 has."""
    return x.astype("<f2")[..., None].view(np.uint8)


def _joined(*parts: Bytes) -> Bytes:
    return np.concatenate(parts, -1).reshape(len(parts[0]), -1)


def _nibbles(codes: Bytes) -> Bytes:
    """Four bits each, the first half of the block in the lower ones: [O, B, 16] of [O, B, 32]."""
    return codes[..., :16] & 15 | codes[..., 16:] << 4


def _fifth_bits(codes: Bytes) -> Bytes:
    return np.packbits(codes >> 4, axis=-1, bitorder="little")


def _q8_0(codes: Bytes, scale: Reals, offset: Reals) -> Bytes:
    return _joined(half(scale), codes - np.uint8(128))  # as signed bytes


def _q4_0(codes: Bytes, scale: Reals, offset: Reals) -> Bytes:
    return _joined(half(scale), _nibbles(codes))


def _q4_1(codes: Bytes, scale: Reals, offset: Reals) -> Bytes:
    return _joined(half(scale), half(offset), _nibbles(codes))


def _q5_0(codes: Bytes, scale: Reals, offset: Reals) -> Bytes:
    return _joined(half(scale), _fifth_bits(codes), _nibbles(codes))


def _q5_1(codes: Bytes, scale: Reals, offset: Reals) -> Bytes:
    return _joined(half(scale), half(offset), _fifth_bits(codes), _nibbles(codes))


def _q4_k(codes: Bytes, scale: Reals, offset: Reals) -> Bytes:
    """Eight sub-blocks with the sub-scale 1 and the zero point as sub-minimum, six bits each."""
    zero = offset.astype(np.uint8)[..., None]
    return k4_bytes(codes, scale, scale, np.ones((*zero.shape[:2], 8), np.uint8), zero.repeat(8, -1))


def k4_bytes(codes: Bytes, d: Reals, dmin: Reals, sc: Bytes, m: Bytes) -> Bytes:
    """`Q4_K`: per block d and dmin [O, B], per sub-block of 32 sc and m [O, B, 8]; `x = d sc q - dmin m`."""
    low = np.concatenate((sc[..., :4] | sc[..., 4:] >> 4 << 6, m[..., :4] | m[..., 4:] >> 4 << 6), -1)
    pairs = codes.reshape(*codes.shape[:2], 4, 2, 32)
    packed = (pairs[..., 0, :] | pairs[..., 1, :] << 4).reshape(*codes.shape[:2], 128)
    return _joined(half(d), half(dmin), low, sc[..., 4:] & 15 | m[..., 4:] << 4, packed)


def _q2_k(codes: Bytes, scale: Reals, offset: Reals) -> Bytes:
    """Sixteen sub-blocks with the sub-scale 1 and the zero point as sub-minimum, four bits each."""
    zero = offset.astype(np.uint8)[..., None].repeat(16, -1)
    return k2_bytes(codes, scale, scale, np.ones_like(zero), zero)


def k2_bytes(codes: Bytes, d: Reals, dmin: Reals, sc: Bytes, m: Bytes) -> Bytes:
    """`Q2_K`: per block d and dmin [O, B], per sub-block of 16 sc and m [O, B, 16]; `x = d sc q - dmin m`."""
    quarters = codes.reshape(*codes.shape[:2], 2, 4, 32)
    packed = quarters[..., 0, :] | quarters[..., 1, :] << 2 | quarters[..., 2, :] << 4 | quarters[..., 3, :] << 6
    return _joined(sc | m << 4, packed.reshape(*codes.shape[:2], 64), half(d), half(dmin))


def _q6_k(codes: Bytes, scale: Reals, offset: Reals) -> Bytes:
    """Sixteen sub-blocks with the sub-scale 1."""
    return k6_bytes(codes, scale, np.ones((*scale.shape, 16), np.int8))


def k6_bytes(codes: Bytes, d: Reals, sc: NDArray[np.int8]) -> Bytes:
    """`Q6_K`: per block d [O, B], per sub-block of 16 sc [O, B, 16]; `x = d sc (q - 32)`."""
    parts = codes.reshape(*codes.shape[:2], 2, 4, 32)
    low = np.concatenate(
        (parts[..., 0, :] & 15 | parts[..., 2, :] << 4, parts[..., 1, :] & 15 | parts[..., 3, :] << 4), -1
    )
    high = parts >> 4
    packed = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    rows = codes.shape[:2]
    return _joined(low.reshape(*rows, 128), packed.reshape(*rows, 64), sc.view(np.uint8), half(d))


TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q8_0", 32, 8, True, _q8_0),
        BlockType("Q5_0", 32, 5, True, _q5_0),
        BlockType("Q4_0", 32, 4, True, _q4_0),
        BlockType("Q5_1", 32, 5, False, _q5_1, with_minimum=True),
        BlockType("Q4_1", 32, 4, False, _q4_1, with_minimum=True),
        BlockType("Q6_K", 256, 6, True, _q6_k),
        BlockType("Q4_K", 256, 4, False, _q4_k),
        BlockType("Q2_K", 256, 2, False, _q2_k),
    )
}
