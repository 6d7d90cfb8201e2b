"""Random numbers as a pure function of what they are for.

A number of a sampler depends on (seed, document, kind, step, position, token id) and not on batch, processes, device,
or numbers drawn before. Full-precision and quantized runs therefore see the same noise, which makes their differences
far less noisy. It is computed on the device that needs it (`philox.py`). Other random numbers come from a `generator`,
on the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol

import torch
from torch import Tensor

from dqx.diffusion.philox import philox, uniforms

Key = str | int

#: Numbers that are made at a time: what lies in memory on the way takes about a hundred bytes for each.
TOGETHER = 2**20


def digest(seed: int, *key: Key, size: int) -> bytes:
    """`size` bytes that are a function of `seed` and `key`.

    1 and "1" are different keys. Raises TypeError for key parts of other types, whose text might differ between
    processes.
    """
    parts: list[Key] = []
    for part in (seed, *key):
        if not isinstance(part, str | Integral):
            raise TypeError(f"noise key {part!r} is a {type(part).__name__}; only str and int name a stream")
        parts.append(part if isinstance(part, str) else int(part))
    return hashlib.blake2b(repr(parts).encode(), digest_size=size).digest()


def generator(seed: int, *key: Key) -> torch.Generator:
    """A CPU generator whose stream is a pure function of `seed` and `key` (strings and integers).

    torch's CPU generator keeps 32 bits of its seed, so among millions of keys a few share a stream. Raises TypeError
    as `digest` does.
    """
    return torch.Generator().manual_seed(int.from_bytes(digest(seed, *key, size=8), "little"))


class Noise(Protocol):
    """Where samplers get their uniforms. Implement it to replay recorded ones."""

    def uniform(self, kind: str, rows: Tensor, positions: Tensor, steps: Tensor, width: int = 1) -> Tensor:
        """Uniforms in [0, 1), a new tensor in float64 [n, width], on the device of `rows`.

        Line i is for position positions[i] of the answer (0 is its first token) in row rows[i] of the batch, at step
        steps[i], counted from 0 over the whole generation; all three are [n]. `kind` is "token" (which token a position
        takes) or "order" (which positions are written first).
        """
        ...


@dataclass(frozen=True)
class SeededNoise:
    """Noise from a seed and one document key per row; it depends on no other row, nor on which positions are asked.

    Seed, document and kind name a stream (96 bits of a hash); Philox's counter has step, position and token id.
    """

    seed: int
    documents: Sequence[Key | tuple[Key, ...]]

    def uniform(self, kind: str, rows: Tensor, positions: Tensor, steps: Tensor, width: int = 1) -> Tensor:
        streams = torch.tensor([self._stream(document, kind) for document in self.documents], device=rows.device)
        words = torch.cat((streams.reshape(-1, 3)[rows], positions[:, None], steps[:, None]), dim=1)
        pair = torch.arange((width + 1) // 2, device=rows.device)  # tokens 2 i and 2 i + 1 share a counter
        out = torch.empty(len(rows), width, dtype=torch.float64, device=rows.device)
        lines = max(1, TOGETHER // width)
        for some, made in zip(words.split(lines), out.split(lines), strict=True):
            first, second, third, position, step = some.T[:, :, None]
            a, b, c, d = philox((pair, position, step, third), (first, second))
            made[:, 0::2] = uniforms(a, b)
            made[:, 1::2] = uniforms(c, d)[:, : width // 2]
        return out

    def _stream(self, document: Key | tuple[Key, ...], kind: str) -> list[int]:
        """Three words."""
        key = document if isinstance(document, tuple) else (document,)
        name = digest(self.seed, *key, kind, size=12)
        return [int.from_bytes(name[i : i + 4], "little") for i in (0, 4, 8)]
