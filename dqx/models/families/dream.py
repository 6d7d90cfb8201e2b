"""Dream (arXiv 2508.15487): config keys and tensor names of `Dream-org/Dream-v0-*-7B` (Qwen2's names).

Traps owned here: q, k and v carry biases, heads are grouped, and the logits are shifted by one position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqx.models.architecture import Architecture
from dqx.models.family import Family, read_keys, register

NAME, MODEL_TYPE = "dream", "Dream"


#: Field of `Architecture` -> key of `config.json`.
KEYS = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "mlp_size": "intermediate_size",
    "n_blocks": "num_hidden_layers", "n_heads": "num_attention_heads", "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps", "mask_token_id": "mask_token_id", "eos_token_id": "eos_token_id",
    "max_length": "max_position_embeddings",
}  # fmt: skip
BLOCK_NAMES = {
    "attn_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}  # fmt: skip
PUBLISHED = Architecture(
    family=NAME, vocab_size=152064, hidden_size=3584, mlp_size=18944, n_blocks=28, n_heads=28, n_kv_heads=4,
    rope_theta=1e6, norm_eps=1e-6, qkv_bias=True, mask_token_id=151666, eos_token_id=151643, max_length=131072,
    logit_shift=True,
)  # fmt: skip


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Dream `config.json`. Raises KeyError for a missing key."""
    return Architecture(
        family=NAME,
        n_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        qkv_bias=True,
        logit_shift=True,
        tied_head=bool(config.get("tie_word_embeddings")),
        **read_keys(config, KEYS),
    )


def config(arch: Architecture) -> dict[str, Any]:
    """The `config.json` of an architecture, with the keys of the published checkpoints."""
    return {key: getattr(arch, field) for field, key in KEYS.items()} | {
        "architectures": ["DreamModel"], "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "bos_token_id": arch.eos_token_id, "full_attn_mask": True, "hidden_act": "silu", "initializer_range": 0.02,
        "max_window_layers": arch.n_blocks, "model_type": MODEL_TYPE, "num_key_value_heads": arch.n_kv_heads,
        "pad_token_id": arch.eos_token_id, "rope_scaling": None, "sliding_window": None,
        "tie_word_embeddings": arch.tied_head, "torch_dtype": "bfloat16", "transformers_version": "4.46.2",
        "use_cache": True, "use_mrope": False, "use_sliding_window": False,
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
        required={
            "hidden_act": ("silu",),
            "use_sliding_window": (False, None),
            "use_mrope": (False, None),
            "full_attn_mask": (True, None),
        },
        ignored=frozenset({"max_window_layers", "sliding_window"}),
        architecture=architecture,
        config=config,
        sampler={"_target_": "dqx.diffusion.samplers.dream.DreamSampler", "top_p": 0.95},
        example="dream_7b_base",
        published=("Dream-7B", PUBLISHED),  # of the paper and its config.json
    )
)
