"""GGUF's block types: which grid each of them holds, and the bytes of codes, scales and offsets.

A block is a run of neighbouring weights of one row. Byte layouts are those of ggml, which `gguf.quants` reads too.

O = outputs, B = blocks per row, N = weights per block (32 or 256), S = sub-blocks of K types, each with a scale.
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
    """One type. `pack` makes the bytes [O, bytes per row] of codes [O, B, N] and numbers that float16 has.

    These are the scale [O, B] and, of types that are not symmetric, the minimum. Types with sub-blocks have two in the
    place of each: d [O, B] and integers [O, B, S] that are multiplied with it, those of minima with the sign turned.
    """

    name: str
    width: int  # N
    bits: int
    symmetric: bool
    pack: Callable[..., Bytes]
    subblocks: int | None = None  # S
    largest: int = 1  # of their integers


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


def _q8_0(codes: Bytes, scale: Reals) -> Bytes:
    return _joined(half(scale), codes - np.uint8(128))  # as signed bytes


def _q4_0(codes: Bytes, scale: Reals) -> Bytes:
    return _joined(half(scale), _nibbles(codes))


def _q4_1(codes: Bytes, scale: Reals, minimum: Reals) -> Bytes:
    return _joined(half(scale), half(minimum), _nibbles(codes))


def _q5_0(codes: Bytes, scale: Reals) -> Bytes:
    return _joined(half(scale), _fifth_bits(codes), _nibbles(codes))


def _q5_1(codes: Bytes, scale: Reals, minimum: Reals) -> Bytes:
    return _joined(half(scale), half(minimum), _fifth_bits(codes), _nibbles(codes))


def _q4_k(codes: Bytes, d: Reals, sc: Bytes, dmin: Reals, m: Bytes) -> Bytes:
    """`x = d sc q - dmin m`, sc and m of six bits per 32 weights."""
    low = np.concatenate((sc[..., :4] | sc[..., 4:] >> 4 << 6, m[..., :4] | m[..., 4:] >> 4 << 6), -1)
    pairs = codes.reshape(*codes.shape[:2], 4, 2, 32)
    packed = (pairs[..., 0, :] | pairs[..., 1, :] << 4).reshape(*codes.shape[:2], 128)
    return _joined(half(d), half(dmin), low, sc[..., 4:] & 15 | m[..., 4:] << 4, packed)


def _q2_k(codes: Bytes, d: Reals, sc: Bytes, dmin: Reals, m: Bytes) -> Bytes:
    """`x = d sc q - dmin m`, sc and m of four bits per 16 weights."""
    return _joined(sc | m << 4, _pairs_of_bits(codes), half(d), half(dmin))


def _pairs_of_bits(codes: Bytes) -> Bytes:
    """The two lowest bits of each code, four codes that lie 32 apart in a byte: [O, B, 64] of [O, B, 256]."""
    quarters = codes.reshape(*codes.shape[:2], 2, 4, 32) & 3
    packed = quarters[..., 0, :] | quarters[..., 1, :] << 2 | quarters[..., 2, :] << 4 | quarters[..., 3, :] << 6
    return packed.reshape(*codes.shape[:2], 64)


def _q3_k(codes: Bytes, d: Reals, sc: Bytes) -> Bytes:
    """`x = d sc (q - 4)`, sc of five bits and a sign per 16 weights, stored as sc + 32."""
    eighths = (codes >> 2).reshape(*codes.shape[:2], 8, 32)
    third_bits = np.packbits(eighths, axis=-2, bitorder="little").reshape(*codes.shape[:2], 32)
    sc = sc + np.uint8(32)
    low = sc[..., :8] & 15 | sc[..., 8:] << 4
    high = (sc >> 4).reshape(*sc.shape[:2], 4, 4)
    high = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    return _joined(third_bits, _pairs_of_bits(codes), low, high, half(d))


def _q6_k(codes: Bytes, d: Reals, sc: Bytes) -> Bytes:
    """`x = d sc (q - 32)`, sc of seven bits and a sign per 16 weights."""
    parts = codes.reshape(*codes.shape[:2], 2, 4, 32)
    low = np.concatenate(
        (parts[..., 0, :] & 15 | parts[..., 2, :] << 4, parts[..., 1, :] & 15 | parts[..., 3, :] << 4), -1
    )
    high = parts >> 4
    packed = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    rows = codes.shape[:2]
    return _joined(low.reshape(*rows, 128), packed.reshape(*rows, 64), sc, half(d))


TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q8_0", 32, 8, True, _q8_0),
        BlockType("Q5_0", 32, 5, True, _q5_0),
        BlockType("Q4_0", 32, 4, True, _q4_0),
        BlockType("Q5_1", 32, 5, False, _q5_1),
        BlockType("Q4_1", 32, 4, False, _q4_1),
        BlockType("Q6_K", 256, 6, True, _q6_k, 16, 127),
        BlockType("Q4_K", 256, 4, False, _q4_k, 8, 63),
        BlockType("Q3_K", 256, 3, True, _q3_k, 16, 31),
        BlockType("Q2_K", 256, 2, False, _q2_k, 16, 15),
    )
}
