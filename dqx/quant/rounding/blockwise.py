"""Blocks of columns rounded whole: the error of a block goes to the blocks after it, none to columns inside.

The column loop of Quant-dLLM (arXiv:2510.03274): a block is a group of `bits`, fitted to its columns as updated so far
and rounded to nearest; then `E = (W - W_q) / u_j` and all later columns lose `E U`, U the upper factor of H^-1 = U^T U.
What GPTQ does column by column is done block by block, so that levels that are fitted to all of a block meet the
weights they were fitted to.

Where we differ from the code: a dead input (H_ii = 0) counts 0 in the damping's mean, as in `gptq.py`.

O = outputs, I = inputs, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dqx.formats.bits import FORMATS, WeightBits, block_formats
from dqx.formats.integers import Grid, finite, wide
from dqx.formats.make import make_grid
from dqx.formats.weight import BoundClip, QuantizedWeight, consecutive_groups, group_width, ranges
from dqx.quant.protocols import Context, Stats, choice_problems
from dqx.quant.rounding.factor import Solver, factored, upper_factor
from dqx.quant.rounding.gptq import STREAMS
from dqx.quant.rounding.levels import BinaryLevels, FittedLevels


@dataclass(frozen=True)
class Blockwise:
    """The settings of `blockwise_round`."""

    damping: float = 0.01  # share of mean(diag H) added to the diagonal
    damp_again: bool = (
        False  # linears of a site damp one Hessian one after the other, as the authors' code does on Dream
    )
    include_zero: bool = True  # ranges hold zero; false: plain min ... max
    stream: str = "quantized"  # whose activations make the Hessian: the quantized model's so far, or "fp"
    levels: BinaryLevels | None = None  # fitted to each group; null: the grid of bits
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    @property
    def one_by_one(self) -> bool:
        return self.levels is not None or self.damp_again

    def grid(self, bits: WeightBits) -> Grid:
        return make_grid(bits, include_zero=self.include_zero) if self.levels is None else self.levels.grid(bits)

    def __call__(self, w_OI: Tensor, bits: WeightBits, stats: Stats, clip: BoundClip | None = None) -> QuantizedWeight:
        damped = 1 + int(stats.get("rounded_before", 0)) if self.damp_again else 1
        damping = (1 + self.damping) ** damped - 1
        return blockwise_round(w_OI, stats["hessian"], self.grid(bits), bits.group_size, clip, self, damping)

    def problems(self, where: str, context: Context) -> list[str]:
        problems = [] if self.levels is None else self.levels.problems(f"{where}.levels", context)
        if not 0 <= self.damping <= 1:
            problems.append(
                f"{where}.damping={self.damping} must lie in 0 ... 1 (a share of mean(diag H)); 0.01 is usual"
            )
        for name in block_formats(context.widths.weight.values()) if self.levels is None else ():
            if FORMATS[name].superblock:
                problems.append(
                    f"{where} reads a group's range when the group is reached, but {name} chooses the scales of "
                    f"{FORMATS[name].superblock} inputs together; write {where}=gptq"
                )
        return problems + choice_problems(f"{where}.stream", self.stream, STREAMS)


def blockwise_round(
    w_OI: Tensor,
    hessian_II: Tensor,
    grid: Grid,
    group_size: int = -1,
    clip: BoundClip | None = None,
    settings: Blockwise | None = None,
    damping: float | None = None,
) -> QuantizedWeight:
    """Round `w_OI` group by group so that `||(W - W_q) X||` stays small, given H = X^T X up to a positive factor.

    Args:
        w_OI: the weight.
        hessian_II: H, symmetric; dead inputs (H_ii = 0) get weight 0. Its upper half is used as room to work in.
        grid: what is rounded to: with levels, theirs.
        group_size: columns of a block; -1: all of them, which is rounding to nearest.
        clip: which range of a group is represented; None: all of it.
        settings: None: the defaults.
        damping: of the factor that is solved with; None: that of the settings, which scores and levels see in any case.

    Raises:
        ValueError: for shapes that do not fit and for a Hessian that is not finite.
    """
    settings = settings or Blockwise()
    n_out, n_in = w_OI.shape
    if hessian_II.shape != (n_in, n_in):
        raise ValueError(f"a weight with {n_in} inputs needs a {n_in} x {n_in} Hessian, not {list(hessian_II.shape)}")
    if not finite(hessian_II):
        raise ValueError("the Hessian holds NaN or infinity: an activation overflowed during calibration")
    w, grid = wide(w_OI).clone(), grid.for_tensor(w_OI)
    hessian = wide(hessian_II).to(w.dtype)
    w[:, hessian.diagonal() == 0] = 0
    group_index = consecutive_groups(n_in, group_size, w.device)
    fitted, width = None, group_width(n_in, group_size)
    scored_u_I = None if damping is None else 1 / upper_factor(hessian, settings.damping)[0].diagonal()
    scale, zero_point = (w.new_empty(n_out, -(-n_in // width)) for _ in range(2))
    codes = torch.empty_like(w, dtype=torch.uint8)
    with factored(hessian, settings.damping if damping is None else damping) as (r, notes):
        solver, u_I = Solver(r), 1 / r.diagonal()
        if settings.levels is not None:
            fitted = FittedLevels(settings.levels, grid, w, u_I, group_index, scored_u_I)
        for g, start in enumerate(range(0, n_in, width)):
            end = min(start + width, n_in)
            live, columns = w[:, start:end], torch.arange(start, end, device=w.device)
            if fitted is None:
                bounds = ranges(live[:, None], grid, clip, columns[None])
                lo, hi = (bound[:, 0, 0] for bound in bounds)
                scale[:, g], zero_point[:, g] = grid.from_range(lo, hi)
                at = scale[:, g, None]
                wanted = live.clamp(lo[:, None], hi[:, None]) if clip is not None and clip.clamps else live
            else:
                fitted.fit(g, live, columns)
                at, wanted, zero_point[:, g] = fitted.at(columns), live, 0
            codes[:, start:end] = rounded = grid.codes(wanted, at, zero_point[:, g, None])
            error = (live - grid.dequantize(rounded, at, zero_point[:, g, None])) / u_I[start:end]
            u = solver.times_u(torch.eye(end - start, n_in - start, dtype=w.dtype, device=w.device), start)
            w[:, end:].addmm_(error, u[:, end - start :], alpha=-1)
    if fitted is not None:
        return fitted.rounded(codes, notes)
    return QuantizedWeight(codes, scale, zero_point, group_index, grid, notes)
