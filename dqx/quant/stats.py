"""Statistics of a linear's input, gathered batch by batch and shared by all linears of one site.

I = inputs. `Collector`s are what a part's `needs` can name.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dqx.quant.grid import wide

CHUNK_TOKENS = 8192  # tokens converted to float32 at a time


class Collector(Protocol):
    """Sees activations [..., I] batch by batch, then gives one tensor."""

    def add(self, x: Tensor) -> None: ...

    def value(self) -> Tensor: ...


class Hessian:
    """`X^T X / n_tokens` [I, I] in float32 (float64 for float64 input); the paper's factor 2 cancels."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.n_tokens = 0

    def add(self, x: Tensor) -> None:
        """Add the tokens of x [..., I]."""
        rows = x.reshape(-1, x.shape[-1])
        if self.total is None:
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            self.total = torch.zeros(rows.shape[1], rows.shape[1], dtype=dtype, device=x.device)
        for chunk in rows.split(CHUNK_TOKENS):
            chunk = wide(chunk)
            self.total.addmm_(chunk.T, chunk)
        self.n_tokens += len(rows)

    def value(self) -> Tensor:
        """The mean over tokens. Raises ValueError if no token was seen."""
        if self.total is None or self.n_tokens == 0:
            raise ValueError("no calibration token reached this linear; give at least one calibration batch")
        return self.total / self.n_tokens


COLLECTORS: dict[str, type[Hessian]] = {"hessian": Hessian}
