"""The golden models and blocks in our names, and what their linears see. Used by the tests of scaling and clipping."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import SITES, TOY
from torch import Tensor

from dqx.models.checkpoint import inspect, load_weights
from dqx.models.family import family_of
from dqx.models.rope import Rope, rope_tables
from dqx.models.transformer import Architecture, Block, MaskedDiffusionTransformer
from dqx.quant.stats import COLLECTORS

GOLDEN = Path(__file__).parent / "golden"
GOLDEN2 = Path(__file__).parent / "golden2"  # recorded from the released code of D2Quant and of Quant-dLLM
GOLDEN3 = Path(__file__).parent / "golden3"  # of families with block-wise attention
#: Where the small checkpoint of a family is.
TINY = {"sdar": GOLDEN3 / "sdar_tiny", "nemotron": GOLDEN3 / "nemotron_tiny", "fast_dllm": GOLDEN3 / "fastdllm2_tiny"}
FAMILIES = ("llada", "dream")  # those of the sets in golden and golden2


def tiny_config(family: str) -> dict:
    """The `config.json` of a family's small checkpoint."""
    return json.loads((TINY.get(family, GOLDEN / f"{family}_tiny") / "config.json").read_text())


def tiny(family: str, dtype: torch.dtype = torch.float32) -> MaskedDiffusionTransformer:
    return load_weights(inspect(str(GOLDEN / f"{family}_tiny"))).to(dtype).eval()


def golden(name: str, folder: Path = GOLDEN) -> dict[str, Tensor]:
    return load_file(folder / f"{name}.safetensors")


def cases(name: str, folder: Path = GOLDEN) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())["cases"]


def hub_name(family: str, role: str) -> str:
    """What the family's checkpoints call a linear or norm inside a block."""
    return family_of(family).block_names[role]


def awq_dream_block() -> Block:
    """The block of the Dream AWQ set: as many key/value heads as heads."""
    config = json.loads((GOLDEN / "awq_dream_config.json").read_text())
    arch = replace(
        TOY,
        hidden_size=config["hidden_size"],
        mlp_size=config["intermediate_size"],
        n_heads=config["num_attention_heads"],
        n_kv_heads=config["num_key_value_heads"],
        rope_theta=config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
    )
    block, data = Block(arch), golden("awq_dream_inputs")
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            module, kind = name.rsplit(".", 1)
            parameter.copy_(data[f"block.{hub_name('dream', module)}.{kind}"])
    return block


def rope(arch: Architecture, length: int, dtype: torch.dtype = torch.float32) -> Rope:
    return rope_tables(arch, torch.arange(length)[None], dtype)


@torch.no_grad()
def statistics(
    block: Block, hidden: Tensor, needs: Mapping[str, frozenset[str]]
) -> tuple[dict[str, dict[str, object]], Tensor]:
    """Statistics of a block's sites on sequences [B, T, D], one after the other, and the block's outputs."""
    collectors = {
        site: {n: COLLECTORS[n](hidden.shape[0] * hidden.shape[1]) for n in names} for site, names in needs.items()
    }
    handles = [
        getattr(block, SITES[site][0]).register_forward_pre_hook(
            lambda module, args, parts=parts: [c.add(args[0]) for c in parts.values()] and None
        )
        for site, parts in collectors.items()
    ]
    tables = rope(block.arch, hidden.shape[1], hidden.dtype)
    outputs = torch.cat([block(x, tables) for x in hidden.split(1)])
    for handle in handles:
        handle.remove()
    return {site: {n: c.value() for n, c in parts.items()} for site, parts in collectors.items()}, outputs
