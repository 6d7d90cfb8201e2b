"""What a model looks like: everything that its `config.json` says about the function computed.

Nothing here imports torch, so that a family can be asked about without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self


@dataclass(frozen=True)
class Attention:
    """Which tokens see which, by position: each sees its own block and the blocks before it.

    Blocks of `block` tokens are counted from position 0. Blocks of 1 make causal attention; None is one block that
    holds everything, full attention.
    """

    block: int | None = None


FULL, CAUSAL = Attention(), Attention(1)


@dataclass(frozen=True)
class Yarn:
    """How rotary angles are stretched beyond the length of training (YaRN, arXiv 2309.00071), as transformers reads it.

    `factor` is by how much, `original_length` the length of training in tokens; pairs of channels that turn more than
    `beta_fast` times within it are left alone, those that turn less than `beta_slow` times are stretched.
    `query_scale` b multiplies queries by `1 + b ln(1 + floor(position / original_length))` (Llama 4).
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # of cos and sin
    query_scale: float = 0.0

    def frequencies(self, theta: float, width: int) -> list[float]:
        """The angle per position of each of the `width / 2` pairs of channels, in radians."""
        length = self.original_length

        def pair(turns: float) -> float:  # the one that turns so often
            return width * math.log(length / (2 * math.pi * turns)) / (2 * math.log(theta))

        low, high = max(math.floor(pair(self.beta_fast)), 0), min(math.ceil(pair(self.beta_slow)), width - 1)
        span = max(high - low, 0.001)  # as transformers avoids a division by 0
        stretched = [min(max((i - low) / span, 0.0), 1.0) for i in range(width // 2)]
        plain = [theta ** (-2 * i / width) for i in range(width // 2)]
        return [f * (1 - s) + f / self.factor * s for f, s in zip(plain, stretched, strict=True)]


@dataclass(frozen=True)
class Architecture:
    """A linear of a block is known by its role, the place where it reads activations by its site. A family with other
    roles has a subclass with `sites`, `block` and the widths of its own."""

    #: The sites in data-flow order, and the roles that read there: those of a dense transformer.
    sites: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attn_in": ("q", "k", "v"),
        "attn_out": ("o",),
        "mlp_in": ("gate", "up"),
        "mlp_out": ("down",),
    }
    block: ClassVar[str] = "dqx.models.transformer.Block"  # the class of its blocks

    family: str
    vocab_size: int
    hidden_size: int
    mlp_size: int
    n_blocks: int
    n_heads: int
    n_kv_heads: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    mask_token_id: int
    eos_token_id: int
    max_length: int
    logit_shift: bool  # True: row i-1 of the head's output predicts token i (Dream)
    tied_head: bool = False
    head_dim: int | None = None  # the width of a head; None: hidden_size / n_heads
    head_norm: bool = False  # whether queries and keys are normalised, head by head, before rope
    yarn: Yarn | None = None
    attention: Attention = FULL  # of a forward that names no other
    block_length: int | None = None  # the tokens that are denoised together, where the checkpoint was trained for that
    end_token_ids: tuple[int, ...] = ()  # others that end an answer, as eos_token_id does

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """From what `dataclasses.asdict` and JSON have made of one; settings that came later may be missing."""
        arch = dict(values)
        arch["end_token_ids"] = tuple(arch.get("end_token_ids", ()))
        arch["attention"] = Attention(**arch.get("attention", {}))
        arch["yarn"] = None if arch.get("yarn") is None else Yarn(**arch["yarn"])
        return cls(**arch)

    @property
    def roles(self) -> tuple[str, ...]:
        """The linears of a block, in data-flow order."""
        return tuple(role for roles in self.sites.values() for role in roles)

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.n_heads

    def in_features(self, role: str) -> int:
        """Input width of a role's linear."""
        if role in self.sites["attn_out"]:
            return self.n_heads * self.head_size
        return self.mlp_size if role in self.sites["mlp_out"] else self.hidden_size

    def out_features(self, role: str) -> int:
        """Output width of a role's linear."""
        if role in self.sites["attn_in"]:
            return (self.n_heads if role == "q" else self.n_kv_heads) * self.head_size
        return self.mlp_size if role in self.sites["mlp_in"] else self.hidden_size
