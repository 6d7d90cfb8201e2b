"""Models whose whole function lies in their weights: what formats of weights alone can hold, and their other files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from dqx.api import DiffusionLM
from dqx.common.files import write_json
from dqx.formats.bits import UNQUANTIZED
from dqx.models.architecture import Architecture
from dqx.models.family import family_of
from dqx.models.transformer import Block, MaskedDiffusionTransformer, RMSNorm
from dqx.quant.linear import QuantLinear

#: The files of a checkpoint that its tokenizer and its way of writing are read from.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
PLACES = {
    "inputs": "the inputs of linears",
    "heads": "queries, keys or values",
    "sequence": "keys or values",
    "stored": "keys or values",
}
TIED = ("tie_word_embeddings", "weight_tying")


def run_time_problems(lm: DiffusionLM) -> list[str]:
    """What the model computes that no weight of its family can hold, each with what to use instead."""
    model = lm.model
    if model.unfinished:
        return ["the model is quantized in part, by an attempt that failed; load its weights again"]
    problems = [
        f"blocks change {PLACES[place]} at run time ({', '.join(sorted(kinds))}), which no engine for the checkpoint "
        "does; use a method without such parts (rtn, gptq, gptaq or awq), or leave the part out (method.kv=null)"
        for place, kinds in _run_time_parts(model).items()
    ]
    if any(norm.bias is not None for norm in model.modules() if isinstance(norm, RMSNorm)):
        problems.append(
            "norms have a bias, put there by a correction, and the family's norms have none; leave it out "
            f"({_without_corrections(lm)}), or use another method"
        )
    return problems


def _without_corrections(lm: DiffusionLM) -> str:
    """The overrides that take the corrections out of the method."""
    names = lm.quantization.method.corrections if lm.quantization else ["NAME"]
    return " ".join(f"~method.corrections.{name}" for name in names)


def _run_time_parts(model: MaskedDiffusionTransformer) -> dict[str, set[str]]:
    """The classes of the modules that quantization put into blocks, by place."""
    parts: dict[str, set[str]] = {}
    for block in model.blocks:
        for place in PLACES:
            for module in getattr(block, place).values():
                if not isinstance(module, nn.Identity):
                    inside = list(module) if isinstance(module, nn.Sequential) else [module]
                    parts.setdefault(place, set()).update(type(part).__name__ for part in inside)
    return parts


def linears(model: MaskedDiffusionTransformer) -> Iterator[tuple[str, str, nn.Module]]:
    """Name (`blocks.0.q`), role and module of the linears of all blocks."""
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        for role, module in block.linears().items():
            yield f"blocks.{index}.{role}", role, module


def rounds_input(module: nn.Module) -> bool:
    """Whether a linear rounds what it reads."""
    if not isinstance(module, QuantLinear) or module.activation is None:
        return False
    return module.activation_bits.bits != UNQUANTIZED


def held_architecture(model: MaskedDiffusionTransformer) -> Architecture:
    """The model's architecture, with a head of its own where quantization gave it one."""
    return replace(model.arch, tied_head=model.head.weight is model.embed.weight)


def hub_config(lm: DiffusionLM) -> dict[str, Any]:
    """The `config.json` of the source, as far as the model is still what it says."""
    arch = held_architecture(lm.model)
    config = lm.checkpoint.config or family_of(arch.family).config(arch)
    changed: dict[str, Any] = {key: arch.tied_head for key in TIED if key in config}
    changed["mask_token_id"] = arch.mask_token_id
    dtype = "dtype" if "dtype" in config else "torch_dtype"
    return config | changed | {dtype: str(lm.model.dtype).removeprefix("torch.")}


def config_problems(lm: DiffusionLM) -> list[str]:
    """Why a `config.json` cannot say what the model is, or none."""
    arch, config = held_architecture(lm.model), hub_config(lm)
    if family_of(arch.family).architecture(config) == arch:
        return []
    return [
        f"{lm.checkpoint.folder} has no config.json, and the one of family {arch.family} cannot say all that the model "
        "computes; export it where it was quantized, from its checkpoint"
    ]


def copy_tokenizer(lm: DiffusionLM, folder: Path) -> None:
    """Copy the tokenizer files of the source, byte by byte."""
    for name in TOKENIZER_FILES:
        if (lm.checkpoint.folder / name).is_file():
            shutil.copyfile(lm.checkpoint.folder / name, folder / name)


def leave_out_code(folder: Path) -> None:
    """Name a tokenizer of transformers' own in `tokenizer_config.json` where it names a class in a file of code."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if config.pop("auto_map", None) is not None:
        fast = (folder / "tokenizer.json").is_file()  # as dqx/models/tokenizer.py chooses
        write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast" if fast else "Qwen2Tokenizer"})
