"""Quantization: `quantize(model, method, bits, batches)` replaces a model's linears in place. See README.md.

`dqx.formats.bits` needs no torch, so that config schemas stay quick to import; the rest loads on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dqx.formats.bits import ActivationBits, BitsConfig, WeightBits

if TYPE_CHECKING:
    from dqx.quant.checkpoint.folder import load_quantized, save_quantized
    from dqx.quant.checkpoint.on_disk import quantize_checkpoint
    from dqx.quant.loop import quantize
    from dqx.quant.method import Method
    from dqx.quant.registry import storable
    from dqx.quant.report import QuantReport
    from dqx.quant.stream import block_statistics

__all__ = [
    "ActivationBits",
    "BitsConfig",
    "Method",
    "QuantReport",
    "WeightBits",
    "block_statistics",
    "load_quantized",
    "quantize",
    "quantize_checkpoint",
    "save_quantized",
    "storable",
]

_LAZY = {
    "Method": "method",
    "QuantReport": "report",
    "block_statistics": "stream",
    "load_quantized": "checkpoint.folder",
    "quantize": "loop",
    "quantize_checkpoint": "checkpoint.on_disk",
    "save_quantized": "checkpoint.folder",
    "storable": "registry",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"dqx.quant.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
