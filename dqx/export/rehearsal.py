"""Whether a format can hold what a run will make, told before the run: a small model goes through the same steps.

It has random weights, the family's blocks and the run's method and bits. Its widths share with the real ones all powers
of two up to 512, so that groups and tiles divide both alike. What a format finds wrong with it is wrong with the real
one; what depends on the numbers in weights (zero points outside of the codes) can still be found at the export.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dqx.common.names import did_you_mean
from dqx.export.formats import FORMATS

if TYPE_CHECKING:
    from dqx.api import DiffusionLM
    from dqx.config.schema import ExportConfig
    from dqx.formats.bits import BitsConfig
    from dqx.models.architecture import Architecture
    from dqx.quant.method import Method

WIDEST, VOCABULARY, TOKENS = 512, 128, 64
_told: dict[str, list[str]] = {}  # of a sweep's runs many ask the same


def export_problems(
    export: ExportConfig, method: Method, bits: BitsConfig, arch: Architecture, dtype: torch.dtype
) -> list[str]:
    """Why `export` cannot hold what `method` makes of a model, each with what to write instead."""
    name = export.format
    if name is None:
        return []
    if name not in FORMATS:
        return [f"export.format={name} is unknown; {did_you_mean(name, FORMATS)}"]
    wrong = FORMATS[name].dtype_problems("export.dtype", export.dtype)
    asked = repr((name, method, bits, arch, dtype))
    if asked not in _told:
        _told[asked] = FORMATS[name].problems(rehearsed(method, bits, arch, dtype))
    return [*wrong, *(f"export.format={name}: {problem}" for problem in _told[asked])]


def rehearsed(method: Method, bits: BitsConfig, arch: Architecture, dtype: torch.dtype) -> DiffusionLM:
    """A small random model of the architecture's kind, quantized as the run will quantize the real one."""
    from dqx.api import DiffusionLM, Quantization
    from dqx.config.schema import ModelConfig
    from dqx.models.checkpoint import Checkpoint
    from dqx.models.transformer import MaskedDiffusionTransformer
    from dqx.quant.loop import quantize

    arch, noise = small(arch, every_block=bool(bits.blocks)), torch.Generator().manual_seed(0)
    method = replace(method, token_weight=None)  # it changes codes, and nothing that a format looks at
    model = MaskedDiffusionTransformer(arch).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.copy_(torch.randn(weight.shape, generator=noise) / weight.shape[1] ** 0.5)
    model.to(dtype)
    ids = torch.randint(VOCABULARY, (4, TOKENS), generator=noise)
    lm = DiffusionLM(model, None, Checkpoint(Path(), {}, arch, {}, dtype), None, ModelConfig())  # type: ignore[arg-type]
    report = quantize(model, method, bits, [ids], progress=False)
    lm.quantization = Quantization(method, bits, report) if report.changed else None
    return lm


def small(arch: Architecture, *, every_block: bool) -> Architecture:
    """An architecture of the same kind, narrow and with a single block, or with all where they differ in bits."""
    width, head = gcd(arch.hidden_size, WIDEST), arch.head_size
    heads = max(width // head, 1)
    return replace(
        arch,
        vocab_size=VOCABULARY,
        mask_token_id=VOCABULARY - 1,
        eos_token_id=0,
        end_token_ids=(),
        hidden_size=width,
        mlp_size=gcd(arch.mlp_size, WIDEST),
        n_blocks=arch.n_blocks if every_block else 1,
        n_heads=heads,
        n_kv_heads=heads if arch.n_kv_heads == arch.n_heads else 1,
        head_dim=head if arch.head_dim or heads * head != width else None,
    )
