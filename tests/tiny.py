"""Tiny models with random weights. Every architecture that tests make up is one of these with some numbers replaced."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dqx.models.architecture import Architecture
from dqx.models.transformer import MaskedDiffusionTransformer, initialise

SITES = Architecture.sites
ROLES = tuple(role for roles in SITES.values() for role in roles)
TOY = Architecture(
    family="dream",
    vocab_size=96,
    hidden_size=64,
    mlp_size=160,
    n_blocks=3,
    n_heads=4,
    n_kv_heads=2,
    rope_theta=1e4,
    norm_eps=1e-6,
    qkv_bias=True,
    mask_token_id=95,
    eos_token_id=94,
    max_length=64,
    logit_shift=True,
)
PLAIN = replace(TOY, family="llada", n_kv_heads=4, norm_eps=1e-5, qkv_bias=False, eos_token_id=0, logit_shift=False)


@dataclass(frozen=True)
class Batch:
    """Calibration sequences [B, T]."""

    ids: Tensor


def random_model(arch: Architecture, seed: int = 0) -> MaskedDiffusionTransformer:
    """A model as it is before training."""
    model = MaskedDiffusionTransformer(arch)
    initialise(model, torch.Generator().manual_seed(seed))
    return model.eval().requires_grad_(False)


def toy(dtype: torch.dtype = torch.float32, arch: Architecture = TOY) -> MaskedDiffusionTransformer:
    """`random_model` with biases that are not zero."""
    model = random_model(arch)
    for block in model.blocks:
        for role in ("q", "k", "v"):
            if getattr(block, role).bias is not None:
                getattr(block, role).bias.normal_(generator=torch.Generator().manual_seed(1))
    return model.to(dtype)


def ids(n: int = 6, length: int = 24, vocab: int = 96) -> Tensor:
    return torch.randint(0, vocab, (n, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: MaskedDiffusionTransformer) -> Tensor:
    return model(ids(2, 16))


def linears(model: MaskedDiffusionTransformer) -> dict[str, nn.Module]:
    """All linears by name."""
    return {f"blocks.{i}.{role}": getattr(block, role) for i, block in enumerate(model.blocks) for role in ROLES}
