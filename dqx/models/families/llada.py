"""LLaDA (arXiv 2502.09992): config keys and tensor names of `GSAI-ML/LLaDA-8B-*` and `LLaDA-1.5`.

Traps owned here: the head is called `ff_out` like every block's down projection, `ff_proj` is the gate,
and the MLP's norm is `ff_norm`.
"""

from __future__ import annotations

from typing import Any

from dqx.models.transformer import Architecture

MODEL_TYPE = "llada"
FAMILY = "llada"

BLOCK_PREFIX = "model.transformer.blocks.{}."
BLOCK_NAMES = {
    "attn_norm": "attn_norm",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "o": "attn_out",
    "mlp_norm": "ff_norm",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}
OUTER_NAMES = {
    "embed.weight": "model.transformer.wte.weight",
    "norm.weight": "model.transformer.ln_f.weight",
    "head.weight": "model.transformer.ff_out.weight",
}

#: config.json settings that would change the function computed and that no published checkpoint uses.
REQUIRED = {
    "alibi": (False, None),
    "attention_layer_norm": (False, None),
    "block_type": ("llama",),
    "block_group_size": (1, None),
    "layer_norm_type": ("rms",),
    "activation_type": ("silu",),
    "rope": (True,),
    "include_bias": (False, None),
    "input_emb_norm": (False, None),
    "scale_logits": (False, None),
    "bias_for_layer_norm": (False, None),
}


def architecture(config: dict[str, Any]) -> Architecture:
    """Read a LLaDA `config.json`. Raises KeyError for a missing key."""
    heads = config["n_heads"]
    return Architecture(
        family=FAMILY,
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=config["d_model"],
        mlp_size=config.get("mlp_hidden_size") or config["mlp_ratio"] * config["d_model"],
        n_blocks=config["n_layers"],
        n_heads=heads,
        n_kv_heads=config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else heads),
        rope_theta=float(config["rope_theta"]),
        norm_eps=float(config["rms_norm_eps"]),
        qkv_bias=bool(config.get("include_qkv_bias")),
        mask_token_id=config["mask_token_id"],
        eos_token_id=config["eos_token_id"],
        max_length=config["max_sequence_length"],
        logit_shift=False,
        tied_head=bool(config.get("weight_tying")),
    )
