"""The tensors of a GGUF file, by llama.cpp's names: what each is stored as, and its numbers when they are asked for.

llama.cpp turns neighbouring channels of LLaDA's heads by one angle, dqx those half a head apart (as Hugging Face's
Llama does), so that rows of q and k are put into its order. Dream's halves are the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor, nn

from dqx.export.gguf.linears import block_type, packed
from dqx.models.architecture import Architecture
from dqx.models.transformer import Block, MaskedDiffusionTransformer
from dqx.quant.linear import QuantLinear

Numbers = NDArray[np.generic]
DTYPES = {"f16": GGMLQuantizationType.F16, "bf16": GGMLQuantizationType.BF16, "f32": GGMLQuantizationType.F32}
OUTER = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
IN_BLOCK = {
    "attn_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "mlp_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the file. `shape` counts weights, rows first; `numbers()` are the bytes of a block type."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    numbers: Callable[[], Numbers]

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size


def tensors(model: MaskedDiffusionTransformer, dtype: str) -> Iterator[StoredTensor]:
    """All tensors; those of two dimensions that are not rounded have `dtype`, vectors are float32 in every file."""
    for name, module, rows in modules(model):
        yield from _of_module(name, module, rows, dtype)


def modules(model: MaskedDiffusionTransformer) -> Iterator[tuple[str, nn.Module, Tensor | None]]:
    """Name in the file, module, and the order of its rows where the file has another one."""
    for name, module in (("embed", model.embed), ("norm", model.norm), ("head", model.head)):
        if name != "head" or model.head.weight is not model.embed.weight:
            yield OUTER[name], module, None
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        for role, name in IN_BLOCK.items():
            yield f"blk.{index}.{name}", getattr(block, role), row_order(model.arch, role)


def row_order(arch: Architecture, role: str) -> Tensor | None:
    """The order [O] in which llama.cpp has the rows of q and k; None: as they are."""
    if arch.family != "llada" or role not in ("q", "k"):
        return None
    rows = torch.arange(arch.out_features(role))
    return rows.view(-1, 2, arch.head_size // 2).transpose(1, 2).reshape(-1)


def _of_module(name: str, module: nn.Module, rows: Tensor | None, dtype: str) -> Iterator[StoredTensor]:
    """The weight of a module and, where it has one, its bias."""
    weight, bias = module.weight, getattr(module, "bias", None)
    assert isinstance(weight, Tensor)
    shape = tuple(weight.shape)
    if isinstance(module, QuantLinear) and module.scale is not None:
        kind = block_type(module)
        yield StoredTensor(
            f"{name}.weight", shape, GGMLQuantizationType[kind.name], partial(packed, module, kind, rows)
        )
    else:
        kept = DTYPES[dtype] if len(shape) > 1 else GGMLQuantizationType.F32
        yield StoredTensor(f"{name}.weight", shape, kept, partial(_plain, weight, kept, rows))
    if isinstance(bias, Tensor):
        f32 = GGMLQuantizationType.F32
        yield StoredTensor(f"{name}.bias", tuple(bias.shape), f32, partial(_plain, bias, f32, rows))


def _plain(tensor: Tensor, kind: GGMLQuantizationType, rows: Tensor | None) -> Numbers:
    tensor = tensor.detach() if rows is None else tensor.detach()[rows.to(tensor.device)]
    return gguf.quants.quantize(tensor.float().cpu().numpy(), kind)
