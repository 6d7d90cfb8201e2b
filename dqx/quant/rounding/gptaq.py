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

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dqx.formats.bits import WeightBits
from dqx.formats.integers import Grid, finite, wide
from dqx.formats.weight import BoundClip, QuantizedWeight
from dqx.quant.protocols import Context, Stats
from dqx.quant.rounding.factor import Solver
from dqx.quant.rounding.gptq import Carry, ColumnSettings, gptq_round


@dataclass(frozen=True)
class GPTAQ(ColumnSettings):
    """GPTAQ's settings: those of GPTQ, and how much of the upstream deviation is made up for."""

    alpha: float = 0.25  # share of the deviation's correction; 0 is GPTQ, 1 is the paper's derivation
    carry_rounded: bool = False  # beyond a chunk carry the rounded weight, as the authors' code does
    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "cross"})
    stream: ClassVar[str] = "both"

    def __call__(self, w_OI: Tensor, bits: WeightBits, stats: Stats, clip: BoundClip | None = None) -> QuantizedWeight:
        return gptaq_round(w_OI, stats["hessian"], stats["cross"], self.grid(bits), bits.group_size, clip, self)

    def problems(self, where: str, context: Context) -> list[str]:
        problems = super().problems(where, context)
        if not 0 <= self.alpha <= 1:
            problems.append(f"{where}.alpha={self.alpha} must lie in 0 ... 1; 0.25 is usual, and 0 is GPTQ")
        return problems


def gptaq_round(
    w_OI: Tensor,
    hessian_II: Tensor,
    cross_II: Tensor,
    grid: Grid,
    group_size: int = -1,
    clip: BoundClip | None = None,
    settings: GPTAQ | None = None,
) -> QuantizedWeight:
    """Round `w_OI` so that `||W_q X_q - W X_fp||` stays small.

    Args:
        w_OI: the weight.
        hessian_II: H = X_q X_q^T. It and D may be multiplied by one common positive factor.
        cross_II: D = (X_fp - X_q) X_q^T: row i belongs to the deviation of input i, column k to the quantized input k.
        grid, group_size, clip, settings: as `gptq_round` takes them, which does the rounding and whose result this is.

    Raises:
        ValueError: as that does, and for a D that does not fit or is not finite.
    """
    settings = settings or GPTAQ()
    if cross_II.shape != hessian_II.shape:
        raise ValueError(f"the cross term must have the Hessian's shape {list(hessian_II.shape)}")
    if not finite(cross_II):
        raise ValueError("the cross term holds NaN or infinity: an activation overflowed during calibration")

    def rows(solver: Solver, order: Tensor, start: int, end: int) -> Tensor:
        d = wide(cross_II[order[start:end, None], order[start:]]).to(solver.r.dtype)
        return carry_rows(d, solver, start, settings.alpha)

    return gptq_round(w_OI, hessian_II, grid, group_size, clip, settings, Carry(rows, settings.carry_rounded))


def carry_rows(cross_CI: Tensor, solver: Solver, start: int, alpha: float) -> Tensor:
    """C rows of P = alpha * triu(D U^T, 1) U from column `start` on, given the same part of D, which is overwritten.

    What rounding column j adds to a later column k is w_j P[j, k].
    """
    return solver.times_u(solver.times_u_transposed(cross_CI, start).triu_(1), start).mul_(alpha)
