"""Roundings: a weight and the statistics of its input in, codes on a grid out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from dqx.quant.bits import WeightBits
from dqx.quant.grid import QuantizedWeight


class Rounding(Protocol):
    """What `method.rounding` must be: a frozen dataclass, so that linears with equal settings share one call.

    `needs` names the statistics of `dqx.quant.stats` it wants. A rounding that needs any has a `stream`:
    "quantized" for statistics of the already quantized model's activations, "fp" for full precision.
    Rows of the weight must be rounded independently of each other: the loop stacks q, k, v and gate, up.
    """

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, w_OI: Tensor, bits: WeightBits, stats: Mapping[str, Tensor]) -> QuantizedWeight: ...

    def problems(self, where: str) -> list[str]: ...
