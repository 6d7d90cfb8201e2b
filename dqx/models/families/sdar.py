"""SDAR (arXiv 2510.06303) and TraDo: config keys and tensor names of `JetLM/SDAR-*-Chat` and `Gen-Verse/TraDo-*`.

The body is Qwen3's: heads of a width of their own, queries and keys normalised head by head before rope. Attention is
block-wise, with blocks counted from position 0.

Traps owned here: `config.json` names neither the mask token nor the length of a block; both are constants of the
authors' scripts, and the length is in the checkpoint's name (`-b16`, ...; 4 where it has none).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dqx.models.architecture import Architecture, Attention
from dqx.models.families.dream import BLOCK_NAMES as QWEN_NAMES
from dqx.models.family import YARN, Family, read_keys, register

NAME, MODEL_TYPE = "sdar", "sdar"
MASK_TOKEN_ID, BLOCK_LENGTH = 151669, 4  # of the authors' generate script

#: Field of `Architecture` -> key of `config.json`.
KEYS = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "mlp_size": "intermediate_size",
    "n_blocks": "num_hidden_layers", "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps", "eos_token_id": "eos_token_id",
    "max_length": "max_position_embeddings",
}  # fmt: skip
BLOCK_NAMES = {**QWEN_NAMES, "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
PUBLISHED = Architecture(
    family=NAME, vocab_size=151936, hidden_size=4096, mlp_size=12288, n_blocks=36, n_heads=32, n_kv_heads=8,
    head_dim=128, rope_theta=1e6, norm_eps=1e-6, qkv_bias=False, mask_token_id=MASK_TOKEN_ID, eos_token_id=151643,
    max_length=32768, logit_shift=False, head_norm=True, attention=Attention(BLOCK_LENGTH), block_length=BLOCK_LENGTH,
)  # fmt: skip
#: Qwen3's of these sizes.
SIZES = {
    "SDAR-1.7B": replace(
        PUBLISHED, hidden_size=2048, mlp_size=6144, n_blocks=28, n_heads=16, tied_head=True
    ),
    "SDAR-4B": replace(PUBLISHED, hidden_size=2560, mlp_size=9728, tied_head=True),
}  # fmt: skip


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read an SDAR `config.json`. Raises KeyError for a missing key."""
    block = config.get("block_size") or BLOCK_LENGTH
    return Architecture(
        family=NAME,
        qkv_bias=False,
        logit_shift=False,
        head_norm=True,
        mask_token_id=config.get("mask_token_id", MASK_TOKEN_ID),
        tied_head=bool(config.get("tie_word_embeddings")),
        attention=Attention(block),
        block_length=block,
        **read_keys(config, KEYS, yarn=YARN),
    )


def config(arch: Architecture) -> dict[str, Any]:
    """The `config.json` of an architecture, with the keys of the published checkpoints, and two that they leave out."""
    return {key: getattr(arch, field) for field, key in KEYS.items()} | {
        "architectures": ["SDARForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "block_size": arch.block_length, "bos_token_id": arch.eos_token_id, "fuse_cross_entropy": False,
        "hidden_act": "silu", "initializer_range": 0.02, "mask_token_id": arch.mask_token_id,
        "max_window_layers": arch.n_blocks, "model_type": MODEL_TYPE, "rope_scaling": None, "sliding_window": None,
        "tie_word_embeddings": arch.tied_head, "torch_dtype": "bfloat16", "use_cache": True,
        "use_sliding_window": False,
    }  # fmt: skip


FAMILY = register(
    Family(
        name=NAME,
        model_type=MODEL_TYPE,
        block_prefix="model.layers.{}.",
        block_names=BLOCK_NAMES,
        outer_names={
            "embed.weight": "model.embed_tokens.weight",
            "norm.weight": "model.norm.weight",
            "head.weight": "lm_head.weight",
        },
        required={"hidden_act": ("silu",), "use_sliding_window": (False, None), "attention_bias": (False, None)},
        ignored=frozenset({"max_window_layers", "sliding_window", "fuse_cross_entropy"}),
        architecture=architecture,
        config=config,
        sampler={"_target_": "dqx.diffusion.samplers.sdar.SDARSampler"},
        example="sdar_4b",
        published=("SDAR-8B", PUBLISHED),  # Qwen3-8B's shape
        sizes=SIZES,
    )
)
