"""Fast-dLLM v2 (arXiv 2509.26328): config keys and tensor names of `Efficient-Large-Model/Fast_dLLM_v2_*` (Qwen2's).

Traps owned here: the logits are shifted by one position, the small model's head is its embedding, and the mask token is
a constant of the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dqx.models.architecture import Architecture, Attention
from dqx.models.families.dream import BLOCK_NAMES
from dqx.models.family import YARN, Family, read_keys, register

NAME, MODEL_TYPE = "fast_dllm", "Fast_dLLM_Qwen"
MASK_TOKEN_ID, BLOCK_LENGTH = 151665, 32  # of the authors' code; the length is the class's default

#: Field of `Architecture` -> key of `config.json`.
KEYS = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "mlp_size": "intermediate_size",
    "n_blocks": "num_hidden_layers", "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
    "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps", "eos_token_id": "eos_token_id",
    "max_length": "max_position_embeddings",
}  # fmt: skip
PUBLISHED = Architecture(
    family=NAME, vocab_size=152064, hidden_size=3584, mlp_size=18944, n_blocks=28, n_heads=28, n_kv_heads=4,
    rope_theta=1e6, norm_eps=1e-6, qkv_bias=True, mask_token_id=MASK_TOKEN_ID, eos_token_id=151645, max_length=32768,
    logit_shift=True, attention=Attention(BLOCK_LENGTH), block_length=BLOCK_LENGTH,
)  # fmt: skip
#: Qwen2.5's of this size.
SIZES = {
    "Fast-dLLM-v2-1.5B": replace(
        PUBLISHED, vocab_size=151936, hidden_size=1536, mlp_size=8960, n_heads=12, n_kv_heads=2, tied_head=True
    ),
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Fast-dLLM v2 `config.json`. Raises KeyError for a missing key."""
    block = config.get("bd_size") or BLOCK_LENGTH
    return Architecture(
        family=NAME,
        qkv_bias=True,
        logit_shift=True,
        mask_token_id=config.get("mask_token_id", MASK_TOKEN_ID),
        tied_head=bool(config.get("tie_word_embeddings")),
        attention=Attention(block),
        block_length=block,
        **read_keys(config, KEYS, yarn=YARN),
    )


def config(arch: Architecture) -> dict[str, Any]:
    """The `config.json` of an architecture, with the keys of the published checkpoints, and the mask token."""
    return {key: getattr(arch, field) for field, key in KEYS.items()} | {
        "architectures": ["Fast_dLLM_QwenForCausalLM"], "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
            "AutoModel": "modeling.Fast_dLLM_QwenModel",
            "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
        },
        "bd_size": arch.block_length, "bos_token_id": arch.eos_token_id, "hidden_act": "silu",
        "initializer_range": 0.02, "layer_types": ["full_attention"] * arch.n_blocks,
        "mask_token_id": arch.mask_token_id, "max_window_layers": arch.n_blocks, "model_type": MODEL_TYPE,
        "rope_scaling": None, "sliding_window": None, "tie_word_embeddings": arch.tied_head,
        "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
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
        required={"hidden_act": ("silu",), "use_sliding_window": (False, None)},
        ignored=frozenset({"max_window_layers", "sliding_window"}),
        architecture=architecture,
        config=config,
        sampler={"_target_": "dqx.diffusion.samplers.fast_dllm.FastDLLMSampler"},
        example="fast_dllm_7b",
        published=("Fast-dLLM-v2-7B", PUBLISHED),
        sizes=SIZES,
    )
)
