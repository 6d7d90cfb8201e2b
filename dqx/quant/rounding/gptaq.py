"""GPTAQ rounding: GPTQ that aims at the full-precision output, not at the output on its own, already disturbed input.

Li et al. 2025, arXiv:2504.02692. With X_q [I, T] the input in the partly quantized model, X_fp in the full-precision
one and D = (X_fp - X_q) X_q^T, the error to make small is ||W_q X_q - W X_fp||^2 instead of ||(W_q - W) X_q||^2.
Column j misses w_j (X_fp - X_q)_j there, and the columns after it make up for as much as they can: the least-squares
solution of `delta X_q[>j] = w_j (X_fp - X_q)_j` is w_j P[j, >j] with P = triu(D U^T, 1) U, U the upper factor of
H^-1 = U^T U. D and H must be divided by the same number of tokens, which then cancels.

`alpha` multiplies P. The paper derives 1; the authors' code has 0.25, found by trial and the default here too. Where we
differ from that code: w_j is the weight just before it is rounded wherever it is carried to, so that `chunk` is only
about speed; the code overwrites a chunk in place, hence carries rounded weights beyond it (`carry_rounded`).

O = outputs, I = inputs, T = tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dqx.formats.bits import WeightBits
from dqx.formats.integers import Grid, wide
from dqx.formats.weight import BoundClip, QuantizedWeight
from dqx.quant.protocols import Context
from dqx.quant.rounding.gptq import GPTQ, gptq_round


@dataclass(frozen=True)
class GPTAQ:
    """GPTAQ's settings: those of GPTQ, and how much of the upstream deviation is made up for."""

    alpha: float = 0.25  # share of the deviation's correction; 0 is GPTQ, 1 is the paper's derivation
    carry_rounded: bool = False  # beyond a chunk carry the rounded weight, as the authors' code does
    damping: float = 0.01  # share of mean(diag H) added to the diagonal
    chunk: int = 128  # columns per lazy update
    act_order: bool = False  # columns by descending diag H instead of left to right
    static_groups: bool = False  # all ranges from the weight before any column is rounded
    fresh_ranges: bool = False  # a group's range from fully updated columns
    include_zero: bool = True  # ranges hold zero; false: plain min ... max
    exact_absmax: bool = False  # symmetric grids: scale = absmax / (2^(b-1) - 1); false: as in GPTQ's code
    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "cross"})
    stream: ClassVar[str] = "both"

    def grid(self, bits: WeightBits) -> Grid:
        return self._gptq().grid(bits)

    def __call__(
        self, w_OI: Tensor, bits: WeightBits, stats: Mapping[str, Any], clip: BoundClip | None = None
    ) -> QuantizedWeight:
        return gptaq_round(
            w_OI,
            stats["hessian"],
            stats["cross"],
            self.grid(bits),
            bits.group_size,
            clip,
            alpha=self.alpha,
            carry_rounded=self.carry_rounded,
            damping=self.damping,
            chunk=self.chunk,
            act_order=self.act_order,
            static_groups=self.static_groups,
            fresh_ranges=self.fresh_ranges,
        )

    def problems(self, where: str, context: Context) -> list[str]:
        found = self._gptq().problems(where, context)
        if not 0 <= self.alpha <= 1:
            found.append(f"{where}.alpha={self.alpha} must lie in 0 ... 1; 0.25 is usual, and 0 is GPTQ")
        return found

    def _gptq(self) -> GPTQ:
        """GPTQ with the settings they share."""
        return GPTQ(
            damping=self.damping,
            chunk=self.chunk,
            act_order=self.act_order,
            static_groups=self.static_groups,
            fresh_ranges=self.fresh_ranges,
            include_zero=self.include_zero,
            exact_absmax=self.exact_absmax,
        )


def gptaq_round(
    w_OI: Tensor,
    hessian_II: Tensor,
    cross_II: Tensor,
    grid: Grid,
    group_size: int = -1,
    clip: BoundClip | None = None,
    *,
    alpha: float = 0.25,
    carry_rounded: bool = False,
    **settings: Any,
) -> QuantizedWeight:
    """Round `w_OI` so that `||W_q X_q - W X_fp||` stays small, given H = X_q X_q^T and D = (X_fp - X_q) X_q^T.

    Row i of `cross_II` = D belongs to the deviation of input i, column k to the quantized input k; H and D may be
    multiplied by one common positive factor. `settings` are those of `gptq_round`, which does the rounding.
    Raises ValueError as that does, and for a D that does not fit or is not finite.
    """
    if cross_II.shape != hessian_II.shape:
        raise ValueError(f"the cross term must have the Hessian's shape {list(hessian_II.shape)}")
    if not cross_II.isfinite().all():
        raise ValueError("the cross term holds NaN or infinity: an activation overflowed during calibration")

    def carry(order: Tensor, u_II: Tensor) -> Tensor:
        return carry_matrix(wide(cross_II)[order][:, order].to(u_II.dtype), u_II, alpha)

    return gptq_round(w_OI, hessian_II, grid, group_size, clip, carry=carry, carry_rounded=carry_rounded, **settings)


def carry_matrix(cross_II: Tensor, u_II: Tensor, alpha: float) -> Tensor:
    """P = alpha * triu(D U^T, 1) U [I, I]: what rounding column j adds to a later column k is w_j P[j, k]."""
    return ((cross_II @ u_II.T).triu_(1) @ u_II).mul_(alpha)
