"""LLaDA (arXiv 2502.09992): config keys and tensor names of `GSAI-ML/LLaDA-8B-*` and `LLaDA-1.5`.

Traps owned here: the head is called `ff_out` like every block's down projection, `ff_proj` is the gate,
and the MLP's norm is `ff_norm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqx.models.architecture import Architecture
from dqx.models.family import Family, read_keys, register

NAME, MODEL_TYPE = "llada", "llada"


#: Field of `Architecture` -> key of `config.json`.
KEYS = {
    "hidden_size": "d_model", "n_blocks": "n_layers", "n_heads": "n_heads", "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps", "mask_token_id": "mask_token_id", "eos_token_id": "eos_token_id",
    "max_length": "max_sequence_length",
}  # fmt: skip
BLOCK_NAMES = {
    "attn_norm": "attn_norm", "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out",
    "mlp_norm": "ff_norm", "gate": "ff_proj", "up": "up_proj", "down": "ff_out",
}  # fmt: skip
REQUIRED = {
    "alibi": (False, None), "attention_layer_norm": (False, None), "block_type": ("llama",),
    "block_group_size": (1, None), "layer_norm_type": ("rms",), "activation_type": ("silu",), "rope": (True,),
    "include_bias": (False, None), "input_emb_norm": (False, None), "scale_logits": (False, None),
    "bias_for_layer_norm": (False, None), "layer_norm_with_affine": (True, None), "rope_full_precision": (True, None),
}  # fmt: skip
#: Of training and speed, what only settings read that are refused, and what stands behind another key.
IGNORED = frozenset({
    "alibi_bias_max", "attention_layer_norm_with_affine", "embedding_dropout", "flash_attention", "init_cutoff_factor",
    "init_device", "init_fn", "init_std", "mlp_ratio", "multi_query_attention", "precision", "residual_dropout",
    "vocab_size",
})  # fmt: skip
PUBLISHED = Architecture(
    family=NAME, vocab_size=126464, hidden_size=4096, mlp_size=12288, n_blocks=32, n_heads=32, n_kv_heads=32,
    rope_theta=500000.0, norm_eps=1e-5, qkv_bias=False, mask_token_id=126336, eos_token_id=126081, max_length=4096,
    logit_shift=False,
)  # fmt: skip


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a LLaDA `config.json`. Raises KeyError for a missing key."""
    return Architecture(
        family=NAME,
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        mlp_size=config.get("mlp_hidden_size") or int(config["mlp_ratio"]) * int(config["d_model"]),
        n_kv_heads=config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else config["n_heads"]),
        qkv_bias=bool(config.get("include_qkv_bias")),
        logit_shift=False,
        tied_head=bool(config.get("weight_tying")),
        **read_keys(config, KEYS),
    )


def config(arch: Architecture) -> dict[str, Any]:
    """The `config.json` of an architecture, with the keys of the published checkpoints."""
    return {key: getattr(arch, field) for field, key in KEYS.items()} | {
        "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "embedding_dropout": 0.0,
        "embedding_size": arch.vocab_size, "flash_attention": False, "include_bias": False,
        "include_qkv_bias": arch.qkv_bias, "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell",
        "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True,
        "mlp_hidden_size": arch.mlp_size, "mlp_ratio": arch.mlp_size // arch.hidden_size, "model_type": MODEL_TYPE,
        "multi_query_attention": None, "n_kv_heads": arch.n_kv_heads, "pad_token_id": arch.eos_token_id,
        "precision": "amp_bf16", "residual_dropout": 0.0, "rope": True, "rope_full_precision": True,
        "scale_logits": False, "torch_dtype": "bfloat16", "use_cache": False, "vocab_size": arch.vocab_size,
        "weight_tying": arch.tied_head,
    }  # fmt: skip


FAMILY = register(
    Family(
        name=NAME,
        model_type=MODEL_TYPE,
        block_prefix="model.transformer.blocks.{}.",
        block_names=BLOCK_NAMES,
        outer_names={
            "embed.weight": "model.transformer.wte.weight",
            "norm.weight": "model.transformer.ln_f.weight",
            "head.weight": "model.transformer.ff_out.weight",
        },
        required=REQUIRED,
        ignored=IGNORED,
        architecture=architecture,
        config=config,
        sampler={"_target_": "dqx.diffusion.samplers.llada.LLaDASampler", "eot_token_id": 126348},
        example="llada_8b_base",
        published=("LLaDA-8B", PUBLISHED),  # of the paper and its config.json
        # Of the code of arXiv 2508.14896, on LLaDA alone: its GPTQ misnames q, k and v, which stay in 16 bit, and
        # its AWQ judges a scale by the whole block. Of the code of Quant-dLLM (arXiv 2510.03274): a smaller share of
        # the blocks of columns has its order changed than on Dream, and o and down are rounded before the others.
        traits=frozenset({"gptq_leaves_out_qkv", "awq_judges_block", "quant_dllm_reallocates_less"}),
    )
)
