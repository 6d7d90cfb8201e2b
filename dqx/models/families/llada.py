"""LLaDA (arXiv 2502.09992): config keys and tensor names of `GSAI-ML/LLaDA-8B-*` and `LLaDA-1.5`.

Traps owned here: the head is called `ff_out` like every block's down projection, `ff_proj` is the gate,
and the MLP's norm is `ff_norm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqx.models.architecture import Architecture
from dqx.models.family import Family, register

NAME, MODEL_TYPE = "llada", "llada"


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a LLaDA `config.json`. Raises KeyError for a missing key."""
    heads = config["n_heads"]
    return Architecture(
        family=NAME,
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


def config(arch: Architecture) -> dict[str, Any]:
    """The `config.json` of an architecture, with the keys of the published checkpoints."""
    return {
        "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": arch.hidden_size,
        "embedding_dropout": 0.0, "embedding_size": arch.vocab_size, "eos_token_id": arch.eos_token_id,
        "flash_attention": False, "include_bias": False, "include_qkv_bias": arch.qkv_bias,
        "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02,
        "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True,
        "mask_token_id": arch.mask_token_id, "max_sequence_length": arch.max_length,
        "mlp_hidden_size": arch.mlp_size, "mlp_ratio": arch.mlp_size // arch.hidden_size, "model_type": MODEL_TYPE,
        "multi_query_attention": None, "n_heads": arch.n_heads, "n_kv_heads": arch.n_kv_heads,
        "n_layers": arch.n_blocks, "pad_token_id": arch.eos_token_id, "precision": "amp_bf16",
        "residual_dropout": 0.0, "rms_norm_eps": arch.norm_eps, "rope": True, "rope_full_precision": True,
        "rope_theta": arch.rope_theta, "scale_logits": False, "torch_dtype": "bfloat16", "use_cache": False,
        "vocab_size": arch.vocab_size, "weight_tying": arch.tied_head,
    }  # fmt: skip


FAMILY = register(
    Family(
        name=NAME,
        model_type=MODEL_TYPE,
        block_prefix="model.transformer.blocks.{}.",
        block_names={
            "attn_norm": "attn_norm",
            "q": "q_proj",
            "k": "k_proj",
            "v": "v_proj",
            "o": "attn_out",
            "mlp_norm": "ff_norm",
            "gate": "ff_proj",
            "up": "up_proj",
            "down": "ff_out",
        },
        outer_names={
            "embed.weight": "model.transformer.wte.weight",
            "norm.weight": "model.transformer.ln_f.weight",
            "head.weight": "model.transformer.ff_out.weight",
        },
        required={
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
        },
        architecture=architecture,
        config=config,
        sampler={"_target_": "dqx.diffusion.samplers.llada.LLaDASampler", "eot_token_id": 126348},
        example="llada_8b_base",
        published=(
            "LLaDA-8B",  # of the paper and its config.json
            Architecture(
                family=NAME,
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
        ),
        # Of the code of arXiv 2508.14896, on LLaDA alone: its GPTQ misnames q, k and v, which stay in 16 bit, and
        # its AWQ judges a scale by the whole block.
        traits=frozenset({"gptq_leaves_out_qkv", "awq_judges_block"}),
    )
)
