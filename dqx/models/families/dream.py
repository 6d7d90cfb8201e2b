"""Dream (arXiv 2508.15487): config keys and tensor names of `Dream-org/Dream-v0-*-7B` (Qwen2's names).

Traps owned here: q, k and v carry biases, heads are grouped, and the logits are shifted by one position.
"""

from __future__ import annotations

from typing import Any

from dqx.models.transformer import Architecture

MODEL_TYPE = "Dream"
FAMILY = "dream"

BLOCK_PREFIX = "model.layers.{}."
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
OUTER_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}

#: config.json settings that would change the function computed and that no published checkpoint uses.
REQUIRED = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "use_sliding_window": (False, None),
    "use_mrope": (False, None),
}


def architecture(config: dict[str, Any]) -> Architecture:
    """Read a Dream `config.json`. Raises KeyError for a missing key."""
    return Architecture(
        family=FAMILY,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        mlp_size=config["intermediate_size"],
        n_blocks=config["num_hidden_layers"],
        n_heads=config["num_attention_heads"],
        n_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        rope_theta=float(config["rope_theta"]),
        norm_eps=float(config["rms_norm_eps"]),
        qkv_bias=True,
        mask_token_id=config["mask_token_id"],
        eos_token_id=config["eos_token_id"],
        max_length=config["max_position_embeddings"],
        logit_shift=True,
        tied_head=bool(config.get("tie_word_embeddings")),
    )
