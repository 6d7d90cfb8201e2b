"""Nemotron-Labs-Diffusion (arXiv 2607.05722): config keys and tensor names of `nvidia/Nemotron-Labs-Diffusion-*`.

The body is Ministral 3's. The same weights serve two kinds of attention: causal for what is final, and full for the
block being denoised, over the keys and values of the causal pass. Attention here is causal unless a sampler says else.

Traps owned here: rope is YaRN, and behind it queries grow with their position (`llama_4_scaling_beta`); every value is
read from the file, as published ones differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dqx.models.architecture import CAUSAL, Architecture, Yarn
from dqx.models.families.dream import BLOCK_NAMES
from dqx.models.family import QUERY_SCALE, YARN, Family, read_keys, register

NAME, MODEL_TYPE = "nemotron", "nemotron_labs_diffusion"

#: Field of `Architecture` -> key of `config.json`.
KEYS = {
    "vocab_size": "vocab_size", "hidden_size": "hidden_size", "mlp_size": "intermediate_size",
    "n_blocks": "num_hidden_layers", "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps", "mask_token_id": "mask_token_id",
    "eos_token_id": "eos_token_id", "max_length": "max_position_embeddings", "block_length": "block_size",
}  # fmt: skip
PUBLISHED = Architecture(
    family=NAME, vocab_size=131072, hidden_size=4096, mlp_size=14336, n_blocks=34, n_heads=32, n_kv_heads=8,
    head_dim=128, rope_theta=1e6, norm_eps=1e-5, qkv_bias=False, mask_token_id=100, eos_token_id=11, max_length=262144,
    logit_shift=False, attention=CAUSAL, block_length=32,
    yarn=Yarn(factor=16.0, original_length=16384, query_scale=0.1),
)  # fmt: skip
#: Ministral 3's of these sizes.
SIZES = {
    "Nemotron-Labs-Diffusion-3B": replace(PUBLISHED, hidden_size=3072, mlp_size=9216, n_blocks=26),
    "Nemotron-Labs-Diffusion-14B": replace(PUBLISHED, hidden_size=5120, mlp_size=16384, n_blocks=40),
}


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Read a Nemotron-Labs-Diffusion `config.json`. Raises KeyError for a missing key."""
    return Architecture(
        family=NAME,
        qkv_bias=False,
        logit_shift=False,
        tied_head=bool(config.get("tie_word_embeddings")),
        attention=CAUSAL,
        **read_keys(config, KEYS, yarn=(*YARN, QUERY_SCALE)),
    )


def config(arch: Architecture) -> dict[str, Any]:
    """The `config.json` of an architecture, with the keys of the published checkpoints."""
    values = {key: getattr(arch, field) for field, key in KEYS.items() if field != "rope_theta"}
    rope: dict[str, Any] = {"rope_theta": arch.rope_theta, "rope_type": "default"}
    if arch.yarn is not None:
        rope = {
            "rope_theta": arch.rope_theta, "rope_type": "yarn", "factor": arch.yarn.factor,
            "original_max_position_embeddings": arch.yarn.original_length, "beta_fast": arch.yarn.beta_fast,
            "beta_slow": arch.yarn.beta_slow, "mscale": 1.0, "mscale_all_dim": 1.0,
            QUERY_SCALE: arch.yarn.query_scale,
        }  # fmt: skip
    return values | {
        "architectures": ["NemotronLabsDiffusionModel"], "attention_bias": False, "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig",
            "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
        },
        "bos_token_id": 1, "dlm_loss_weight": None, "dlm_paradigm": "bidirectional", "dp_varying_mask_ratio": False,
        "hidden_act": "silu", "initializer_range": 0.02, "mlp_bias": False, "model_type": MODEL_TYPE,
        "rope_parameters": rope, "sliding_window": None, "tie_word_embeddings": arch.tied_head,
        "torch_dtype": "bfloat16", "use_cache": False,
    }  # fmt: skip


FAMILY = register(
    Family(
        name=NAME,
        model_type=MODEL_TYPE,
        block_prefix="encoder.layers.{}.",
        block_names=BLOCK_NAMES,
        outer_names={
            "embed.weight": "encoder.embed_tokens.weight",
            "norm.weight": "encoder.norm.weight",
            "head.weight": "diffusion_head.weight",
        },
        required={
            "hidden_act": ("silu",),
            "attention_bias": (False, None),
            "mlp_bias": (False, None),
            "sliding_window": (None,),
            "dlm_paradigm": ("bidirectional",),
        },
        ignored=frozenset({"dlm_loss_weight", "dp_varying_mask_ratio"}),
        architecture=architecture,
        config=config,
        sampler={"_target_": "dqx.diffusion.samplers.nemotron.NemotronSampler"},
        example="nemotron_8b",
        published=("Nemotron-Labs-Diffusion-8B", PUBLISHED),
        sizes=SIZES,
    )
)
