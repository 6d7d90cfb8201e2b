"""What the parts of a method are told about where they work: before weights load, and while they are applied."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dqx.diffusion.noise import Key, generator
from dqx.formats.bits import BitsConfig
from dqx.formats.integers import Grid
from dqx.models.transformer import Architecture, rope_tables
from dqx.quant.activations_store import Memory

if TYPE_CHECKING:
    from dqx.quant.method import Method
    from dqx.quant.protocols import Clip


@dataclass(frozen=True)
class Setting:
    """What a part can look at to tell whether it will work."""

    arch: Architecture
    bits: BitsConfig
    method: Method


@dataclass(frozen=True)
class Context:
    """What a part can look at while it is applied."""

    arch: Architecture
    bits: BitsConfig
    method: Method
    seed: int = 0
    name: str = ""  # the part's name in the method
    index: int = -1  # of the block; -1: the whole model
    sequence_lengths: tuple[int, ...] = ()  # tokens of every calibration sequence
    memory: Memory = field(default_factory=Memory)  # for what grows with the calibration text

    def at(self, **changes: object) -> Context:
        """The context of another part or block."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def generator(self, *key: Key) -> torch.Generator:
        """Random numbers as a pure function of seed, part, block and `key`."""
        return generator(self.seed, "quantize", self.name, self.index, *key)

    def grid(self, role: str) -> tuple[Grid, int] | None:
        """The grid and group size that the role's weight will be rounded to; None where it stays in 16 bit."""
        rounding, bits = self.method.rounding_of(role), self.bits.weight_of(role)
        grid = None if rounding is None else rounding.grid(bits)
        return None if grid is None or grid.identity else (grid, bits.group_size)

    def clip(self, role: str) -> Clip | None:
        """The clip that the role's rounding will use."""
        return self.method.clip_of(role)

    def rope(self, length: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """The rotary tables of a sequence of `length` tokens."""
        positions = torch.arange(length, device=device)[None]
        return rope_tables(positions, self.arch.head_size, self.arch.rope_theta, dtype)
