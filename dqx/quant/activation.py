"""Activation quantizers: the input of a linear, rounded at run time to a grid found from the input itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dqx.quant.bits import ActivationBits
from dqx.quant.grid import Grid


@dataclass(frozen=True)
class PerToken:
    """One dynamic grid per token, over all channels.

    Symmetric: `scale = absmax / (2^(b-1) - 1)`, which integer kernels use; asymmetric: min ... max.
    """

    clip_ratio: float = 1.0  # share of the range that is kept; values beyond it saturate
    include_zero: bool = True  # asymmetric ranges hold zero

    def __call__(self, x: Tensor, bits: ActivationBits) -> Tensor:
        """x [..., I] fake-quantized, in the dtype of x. 16 bits returns x itself."""
        grid = Grid(bits.bits, bits.symmetric, self.include_zero, exact_absmax=True)
        return grid.fake(x, clip_ratio=self.clip_ratio)

    def problems(self, where: str) -> list[str]:
        if 0 < self.clip_ratio <= 1:
            return []
        return [f"{where}.clip_ratio={self.clip_ratio} must lie above 0 and not above 1; 1.0 clips nothing"]
