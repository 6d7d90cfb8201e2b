"""Rotary position embeddings: half-split pairs of channels, turned by angles that grow with the position.

Shapes: B batch, T tokens, H heads, E head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dqx.models.architecture import Architecture


class Rope(NamedTuple):
    """cos and sin [B, 1, T, E] of the angles, sin negative in the first half, and the factors [B, 1, T, 1] of queries
    (None: 1)."""

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None = None

    def at(self, rows: Tensor) -> Rope:
        """The tables of the columns `rows` [B, R]."""

        def pick(table: Tensor) -> Tensor:
            index = rows[:, None, :, None].expand(-1, 1, -1, table.shape[-1])
            return table.expand(len(rows), -1, -1, -1).gather(2, index)

        return Rope(pick(self.cos), pick(self.sin), None if self.query_scale is None else pick(self.query_scale))

    def query(self, q: Tensor) -> Tensor:
        """Queries [B, H, T, E], rotated and scaled."""
        turned = rotated(q, self.cos, self.sin)
        return turned if self.query_scale is None else (turned * self.query_scale).to(q.dtype)

    def key(self, k: Tensor) -> Tensor:
        """Keys [B, H, T, E], rotated."""
        return rotated(k, self.cos, self.sin)


def rope_tables(arch: Architecture, positions: Tensor, dtype: torch.dtype) -> Rope:
    """The tables at `positions` [B, T], computed in `dtype`, at least float32.

    A pair of channels [i] and [i + E / 2] turns by one angle, which is negative in the first half: see `rotated`.
    """
    width, device = arch.head_size, positions.device
    if arch.yarn is None:
        inv_freq = arch.rope_theta ** -(torch.arange(0, width, 2, device=device, dtype=dtype) / width)
    else:
        inv_freq = torch.tensor(arch.yarn.frequencies(arch.rope_theta, width), device=device, dtype=dtype)
    angles = positions[:, None, :, None].to(dtype) * inv_freq
    angles = torch.cat((-angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    if arch.yarn is None:
        return Rope(cos, sin)
    scale = None
    if arch.yarn.query_scale:
        turns = (positions // arch.yarn.original_length).to(dtype)
        scale = (1 + arch.yarn.query_scale * torch.log1p(turns))[:, None, :, None]
    return Rope(cos * arch.yarn.attention_factor, sin * arch.yarn.attention_factor, scale)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, E] turned by half-split pairs, in the dtype of the tables, back in the dtype of x."""
    wide = x.to(cos.dtype)
    return (wide * cos).add_(wide.roll(wide.shape[-1] // 2, dims=-1) * sin).to(x.dtype)
