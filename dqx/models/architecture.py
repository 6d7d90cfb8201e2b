"""What a model looks like: everything that its `config.json` says about the function computed.

Nothing here imports torch, so that a family can be asked about without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar


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
    end_token_ids: tuple[int, ...] = ()  # others that end an answer, as eos_token_id does

    @property
    def roles(self) -> tuple[str, ...]:
        """The linears of a block, in data-flow order."""
        return tuple(role for roles in self.sites.values() for role in roles)

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.n_heads

    def in_features(self, role: str) -> int:
        """Input width of a role's linear."""
        return self.mlp_size if role in self.sites["mlp_out"] else self.hidden_size

    def out_features(self, role: str) -> int:
        """Output width of a role's linear."""
        if role in ("k", "v"):
            return self.n_kv_heads * self.head_size
        return self.mlp_size if role in self.sites["mlp_in"] else self.hidden_size
