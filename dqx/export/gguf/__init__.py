"""GGUF, llama.cpp's file: LLaDA and Dream, whose denoising llama.cpp knows (README.md beside this folder)."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from torch import nn

from dqx.api import DiffusionLM
from dqx.export.gguf.linears import Unfit, block_type
from dqx.formats.bits import ActivationBits
from dqx.models.transformer import Block, RMSNorm
from dqx.quant.activation import PerToken
from dqx.quant.linear import QuantLinear

FAMILIES = ("llada", "dream")
#: Modules of a block that round keys, values and queries, and the rotation of both that changes no score.
OF_KEYS_AND_VALUES = {
    "HeadQuantizer", "ChannelQuantizer", "FixedRange", "AllButRecent", "Centered", "OnlineHadamard"
}  # fmt: skip
#: How the CPU kernels of types without and with sub-blocks round inputs.
BLOCK_INPUTS = ActivationBits(8, symmetric=True, group_size=32, scale_dtype="float16")
SUPERBLOCK_INPUTS = ActivationBits(8, symmetric=True, group_size=256)
NORM_BIAS = (
    "a norm has a bias, put there by a correction, and the file has no tensor for it; leave it out "
    "(~method.corrections.mean_shift, ~method.corrections.final_shift), or use another method"
)


def problems(lm: DiffusionLM) -> list[str]:
    """All reasons why no GGUF file holds this model, each with what to use instead."""
    if find_spec("gguf") is None:
        return ["the package gguf is missing; pip install 'dqx[export]'"]
    arch, found = lm.model.arch, list[str]()
    if arch.family not in FAMILIES:
        return [f"llama.cpp does not denoise models of family {arch.family}; use one of {', '.join(FAMILIES)}"]
    for index, block in enumerate(lm.model.blocks):
        assert isinstance(block, Block)
        found += [f"{what} (first in block {index})" for what in _of_block(block)]
    if lm.model.norm.bias is not None:
        found.append(f"{NORM_BIAS} (first in the final norm)")
    first: dict[str, str] = {}
    for problem in found:
        first.setdefault(problem.partition(" (first in")[0], problem)
    return list(first.values())


def _of_block(block: Block) -> list[str]:
    """What of a block has no place in the file."""
    found = []
    for site, module in block.inputs.items():
        if not isinstance(module, nn.Identity):
            kinds = " and ".join(type(part).__name__ for part in _parts(module))
            found.append(
                f"the input of {site} is transformed at run time ({kinds}), which llama.cpp does not do; use a method "
                "that folds all it does into weights: gptq, gptaq, awq, rtn, smoothquant"
            )
    for places in (block.heads, block.sequence, block.stored):
        others = sorted({type(part).__name__ for part in _all_parts(places)} - OF_KEYS_AND_VALUES)
        if others:
            found.append(
                f"queries, keys or values pass through {' and '.join(others)} at run time, which llama.cpp does not "
                "have; leave out method.kv and rotations of heads"
            )
    if any(isinstance(module, RMSNorm) and module.bias is not None for module in block.children()):
        found.append(NORM_BIAS)
    unfit: dict[str, list[str]] = {}
    for role, linear in block.linears().items():
        if isinstance(linear, QuantLinear) and linear.scale is not None:
            try:
                block_type(linear)
            except Unfit as problem:
                unfit.setdefault(str(problem), []).append(role)
    found += [f"{', '.join(roles)}: {problem}" for problem, roles in unfit.items()]
    return found


def _parts(module: nn.Module) -> list[nn.Module]:
    """The modules that stand in one place."""
    inside = list(module) if isinstance(module, nn.Sequential) else [module]
    return [part for part in inside if not isinstance(part, nn.Identity)]


def _all_parts(places: nn.ModuleDict) -> list[nn.Module]:
    return [part for module in places.values() for part in _parts(module)]


def notes(lm: DiffusionLM) -> list[str]:
    """What llama.cpp does differently than dqx with this model."""
    told = []
    blocks = [block for block in lm.model.blocks if isinstance(block, Block)]
    linears = [linear for block in blocks for linear in block.linears().values() if isinstance(linear, QuantLinear)]
    if any(_all_parts(places) for block in blocks for places in (block.heads, block.sequence, block.stored)):
        told.append("keys and values were rounded in dqx (method.kv); llama.cpp keeps them whole")
    others = [linear for linear in linears if not rounds_as_the_engine(linear)]
    if any(linear.activation is not None for linear in others):
        told.append("inputs were rounded in dqx; the file does not say so, llama.cpp rounds them in its own way")
    if any(linear.scale is not None for linear in others):
        told.append("llama.cpp on a CPU rounds inputs of rounded weights to 8 bits; bits=gguf_... does so in dqx")
    return told


def rounds_as_the_engine(linear: QuantLinear) -> bool:
    """Whether the input is rounded as llama.cpp's CPU kernels do for the type of the weight."""
    if linear.scale is None:
        return False
    kernel = SUPERBLOCK_INPUTS if block_type(linear).subblocks else BLOCK_INPUTS
    return linear.activation == PerToken() and linear.activation_bits == kernel


def write(lm: DiffusionLM, out: Path, dtype: str = "f16") -> None:
    """Write the file, whole or not at all; `dtype` (f16, bf16, f32) is that of matrices that are not rounded."""
    import gguf

    from dqx.export.gguf.metadata import add_model, add_tokenizer
    from dqx.export.gguf.tensors import tensors

    stored = list(tensors(lm.model, dtype))
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(unfinished, lm.model.arch.family)
    add_model(writer, lm, [each.kind for each in stored if len(each.shape) > 1])
    add_tokenizer(writer, lm.tokenizer, lm.model.arch)
    for each in stored:
        writer.add_tensor_info(each.name, each.shape, np.dtype(np.float32), each.nbytes, each.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for each in stored:
            writer.write_tensor_data(each.numbers())
        writer.close()
        unfinished.rename(out)
    finally:
        unfinished.unlink(missing_ok=True)
