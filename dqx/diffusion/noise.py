"""Random numbers as a pure function of what they are for.

A number depends on (seed, document, what, step, position) and not on batch, processes, device, or numbers drawn before.
Full-precision and quantized runs therefore see the same noise, which makes their differences far less noisy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol

import torch
from torch import Tensor

Key = str | int


def generator(seed: int, *key: Key) -> torch.Generator:
    """A CPU generator whose stream is a pure function of `seed` and `key` (strings and integers).

    1 and "1" are different keys. torch's CPU generator keeps 32 bits of its seed, so among millions of keys a few share
    a stream. Raises TypeError for key parts of other types, whose text might differ between processes.
    """
    parts: list[Key] = []
    for part in (seed, *key):
        if not isinstance(part, str | Integral):
            raise TypeError(f"noise key {part!r} is a {type(part).__name__}; only str and int name a stream")
        parts.append(part if isinstance(part, str) else int(part))
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class Noise(Protocol):
    """Where samplers get their uniforms. Implement it to replay recorded ones."""

    def uniform(self, kind: str, step: int, row: int, positions: Tensor, width: int) -> Tensor:
        """Uniforms in [0, 1), float64 [n, width], for `positions` [n] of the answer (0 is its first token).

        `kind` is "token" (which token a position takes) or "order" (which positions are written first),
        `step` counts from 0 over the whole generation, `row` is the row of the batch.
        """
        ...


@dataclass(frozen=True)
class SeededNoise:
    """Noise from a seed and one document key per row; it depends on no other row, nor on which positions are asked."""

    seed: int
    documents: Sequence[Key | tuple[Key, ...]]

    def uniform(self, kind: str, step: int, row: int, positions: Tensor, width: int) -> Tensor:
        document = self.documents[row]
        key = document if isinstance(document, tuple) else (document,)
        out = torch.empty(len(positions), width, dtype=torch.float64)
        for i, position in enumerate(positions.tolist()):
            stream = generator(self.seed, *key, kind, step, position)
            out[i] = torch.rand(width, generator=stream, dtype=torch.float64)
        return out
