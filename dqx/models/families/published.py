"""The published shapes of the two families, for estimates where no checkpoint lies at hand.

Read from the papers (LLaDA, arXiv:2502.09992; Dream, arXiv:2508.15487) and the published configurations. A model that
is loaded is always built from its own `config.json`.
"""

from __future__ import annotations

from dqx.models.transformer import Architecture

PUBLISHED = {
    "LLaDA-8B": Architecture(
        family="llada",
        vocab_size=126464,
        hidden_size=4096,
        mlp_size=12288,
        n_blocks=32,
        n_heads=32,
        n_kv_heads=32,
        rope_theta=500000.0,
        norm_eps=1e-5,
        qkv_bias=False,
        mask_token_id=126336,
        eos_token_id=126081,
        max_length=4096,
        logit_shift=False,
    ),
    "Dream-7B": Architecture(
        family="dream",
        vocab_size=152064,
        hidden_size=3584,
        mlp_size=18944,
        n_blocks=28,
        n_heads=28,
        n_kv_heads=4,
        rope_theta=1e6,
        norm_eps=1e-6,
        qkv_bias=True,
        mask_token_id=151666,
        eos_token_id=151643,
        max_length=131072,
        logit_shift=True,
    ),
}


def of_family(family: str) -> tuple[str, Architecture] | None:
    """Name and architecture of a family's published model; None for a family that is not known."""
    return next(((name, arch) for name, arch in PUBLISHED.items() if arch.family == family), None)
