"""GPTQ rounding: columns left to right, each one's error pushed onto those not yet rounded.

Frantar et al. 2023, arXiv:2210.17323, Algorithm 1, with the options of the authors' code. Where we differ:

* The paper's loop needs U of H^-1 = U^T U. Ours works with its inverse, R of H = R R^T, which comes straight from H:
  the errors of the columns before j are E = (W - W_q) R, so a chunk of columns is brought up to date by one product
  with R and the small inverse of the chunk's own block. The same numbers, with less work, memory and rounding.
* A dead input (H_ii = 0) counts 0 in the damping's mean and comes last in `act_order`. The authors' code sets
  H_ii = 1 before both, which depends on the units of H.

O = outputs, I = inputs, G = groups per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from dqx.formats.bits import FORMATS, WeightBits, block_formats
from dqx.formats.integers import Grid, finite, wide
from dqx.formats.make import make_grid
from dqx.formats.weight import BoundClip, QuantizedWeight, consecutive_groups, group_ranges, group_width, ranges
from dqx.quant.protocols import Context, Stats, choice_problems
from dqx.quant.rounding.columns import ColumnLoop
from dqx.quant.rounding.factor import Solver, factored, triangular_inverse
from dqx.quant.rounding.levels import BinaryLevels, FittedLevels

STREAMS = ("quantized", "fp")


@dataclass(frozen=True)
class ColumnSettings:
    """How a weight's columns are gone through, and the grid they are rounded to; see `gptq_round`."""

    damping: float = 0.01  # share of mean(diag H) added to the diagonal
    chunk: int = 128  # columns per lazy update
    act_order: bool = False  # columns by descending diag H instead of left to right
    group_order: bool = False  # so inside each group, and the groups by their largest; no index is stored
    static_groups: bool = False  # all ranges from the weight before any column is rounded
    fresh_ranges: bool = False  # a group's range from fully updated columns
    include_zero: bool = True  # ranges hold zero; false: plain min ... max
    exact_absmax: bool = False  # symmetric grids: scale = absmax / (2^(b-1) - 1); false: as in GPTQ's code
    levels: BinaryLevels | None = None  # fitted to each group; null: the grid of bits

    @property
    def one_by_one(self) -> bool:
        return self.levels is not None

    def grid(self, bits: WeightBits) -> Grid:
        if self.levels is not None:
            return self.levels.grid(bits)
        return make_grid(bits, include_zero=self.include_zero, exact_absmax=self.exact_absmax)

    def problems(self, where: str, context: Context) -> list[str]:
        problems = [] if self.levels is None else self.levels.problems(f"{where}.levels", context)
        if self.act_order and self.group_order:
            problems.append(
                f"{where}.act_order=true and {where}.group_order=true are two orders of the columns; set one to false"
            )
        if not 0 <= self.damping <= 1:
            problems.append(
                f"{where}.damping={self.damping} must lie in 0 ... 1 (a share of mean(diag H)); 0.01 is usual"
            )
        if self.chunk < 1:
            problems.append(f"{where}.chunk={self.chunk} must be at least 1 column; 128 is usual")
        if self.static_groups and self.fresh_ranges:
            problems.append(
                f"{where}.static_groups=true reads ranges before the first column, {where}.fresh_ranges=true when a "
                "group is reached; set one of them to false"
            )
        for name in block_formats(context.widths.weight.values()) if self.fresh_ranges else ():
            if FORMATS[name].superblock:
                problems.append(
                    f"{where}.fresh_ranges=true reads a group's range when the group is reached, but {name} chooses "
                    f"the scales of {FORMATS[name].superblock} inputs together; write {where}.fresh_ranges=false"
                )
        for name in block_formats(context.widths.weight.values()) if self.act_order and not self.static_groups else ():
            problems.append(
                f"{where}.act_order=true groups inputs in the order of their activations, but {name} shares a scale "
                f"among neighbours; add {where}.static_groups=true"
            )
        return problems


@dataclass(frozen=True)
class GPTQ(ColumnSettings):
    """GPTQ's settings."""

    stream: str = "quantized"  # whose activations make the Hessian: the quantized model's so far, or "fp"
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __call__(self, w_OI: Tensor, bits: WeightBits, stats: Stats, clip: BoundClip | None = None) -> QuantizedWeight:
        return gptq_round(w_OI, stats["hessian"], self.grid(bits), bits.group_size, clip, self)

    def problems(self, where: str, context: Context) -> list[str]:
        return super().problems(where, context) + choice_problems(f"{where}.stream", self.stream, STREAMS)


@dataclass(frozen=True)
class Carry:
    """A second feedback: after column j is rounded, w_j P[j, k] is added to every later column k.

    P [I, I] is upper triangular with diagonal 0. `rows(solver, order, start, end)` gives P[start:end, start:], in the
    columns' order [I]. w_j is the column as it was just before rounding; for columns beyond the chunk, as `rounded`
    where that is set.
    """

    rows: Callable[[Solver, Tensor, int, int], Tensor]
    rounded: bool = False


def gptq_round(
    w_OI: Tensor,
    hessian_II: Tensor,
    grid: Grid,
    group_size: int = -1,
    clip: BoundClip | None = None,
    settings: ColumnSettings | None = None,
    carry: Carry | None = None,
) -> QuantizedWeight:
    """Round `w_OI` so that `||(W - W_q) X||` stays small, given H = X^T X of its input up to a positive factor.

    Ranges: per row (`group_size=-1`) from the untouched weight. Per group of consecutive columns (consecutive in the
    chosen order) when the group's first column is reached: by default, as in the authors' code, from columns as
    updated at the end of the previous chunk, so that `chunk` matters where it is larger than a group; with
    `fresh_ranges` from columns with every update so far, so that `chunk` is only about speed. With `static_groups`
    groups are consecutive in the original order and their ranges come from the weight before the first column, as they
    do in any case in formats with superblocks. With
    `group_order` groups are consecutive in the original order too, and gone through one after the other. `levels` are
    fitted where and when ranges would be read.

    Args:
        w_OI: the weight.
        hessian_II: H, symmetric; dead inputs (H_ii = 0) get weight 0. Its upper half is used as room to work in.
        grid: what is rounded to: with levels, theirs.
        group_size: inputs that share a scale; -1: one group per row.
        clip: which range of a group is represented; None: all of it.
        settings: how columns are gone through; None: the defaults.
        carry: a second feedback (GPTAQ's).

    Returns:
        Codes and scales. If the factorisation fails it is tried in float64, then with more damping; `notes` say so.

    Raises:
        ValueError: for shapes that do not fit and for a Hessian that is not finite.
    """
    settings = settings or ColumnSettings()
    levels = settings.levels
    chunk, fresh_ranges = settings.chunk, settings.fresh_ranges
    static_groups = settings.static_groups or grid.superblocks
    n_out, n_in = w_OI.shape
    if hessian_II.shape != (n_in, n_in):
        raise ValueError(f"a weight with {n_in} inputs needs a {n_in} x {n_in} Hessian, not {list(hessian_II.shape)}")
    if not finite(hessian_II):
        raise ValueError("the Hessian holds NaN or infinity: an activation overflowed during calibration")
    width = group_width(n_in, group_size)
    group_index = consecutive_groups(n_in, group_size, w_OI.device)
    n_groups = -(-n_in // width)

    grid = grid.for_tensor(w_OI)
    w = wide(w_OI).T.clone(memory_format=torch.contiguous_format)  # [I, O]: a column of W is one contiguous row
    hessian = wide(hessian_II).to(w.dtype)
    dead = hessian.diagonal() == 0
    ranges_on_the_way = not static_groups and (group_size != -1 or levels is not None)
    if group_size == -1 and levels is None:
        lo, hi = (t.T.contiguous() for t in group_ranges(w.T, grid, -1, clip))  # [G, O]
    w[dead] = 0
    if group_size != -1 and static_groups and levels is None:
        lo, hi = (t.T.contiguous() for t in group_ranges(w.T, grid, group_size, clip))
    if ranges_on_the_way or levels is not None:
        lo, hi, scale, zero_point = (w.new_zeros(n_groups, n_out) for _ in range(4))
    else:
        scale, zero_point = (t.T.contiguous() for t in grid.from_ranges(lo.T, hi.T))

    order, in_order = column_order(hessian.diagonal(), width, settings), w
    if settings.act_order or settings.group_order:
        w, hessian = w[order], hessian[order[:, None], order]
    if static_groups or group_size == -1 or settings.group_order:
        group_of_column = group_index[order]
    else:
        group_of_column = group_index
        group_index = torch.empty_like(group_index).scatter_(0, order, group_index)
    fitted, column_scale, codes = None, None, torch.empty(n_out, n_in, dtype=torch.uint8, device=w.device)
    with factored(hessian, settings.damping) as (r, notes):
        solver = None if carry is None else Solver(r)
        if levels is not None:
            u_I = torch.empty_like(w[:, 0]).scatter_(0, order, 1 / r.diagonal())
            fitted = FittedLevels(levels, grid, in_order.T, u_I, group_index)
            scale = fitted.scale
            for g, columns in enumerate(torch.arange(n_in, device=w.device).split(width) if static_groups else ()):
                fitted.fit(g, in_order[columns].T, columns)
            column_scale = fitted.column[order]
        del in_order

        # groups as they are reached
        turns = group_of_column[::width].tolist() if settings.group_order else range(n_groups)
        loops: dict[tuple[int, int], ColumnLoop] = {}
        for start in range(0, n_in, chunk):
            end = reach = min(start + chunk, n_in)
            begun = [j for j in range(start, end) if ranges_on_the_way and j % width == 0]  # groups' first columns
            if begun:
                reach = max(end, min(begun[-1] + width, n_in))  # the last one may end in a later chunk
            inside, known = end - start, reach - start
            if (inside, known) not in loops:
                loops[inside, known] = ColumnLoop(
                    w,
                    grid,
                    inside,
                    known,
                    updated=known if fresh_ranges else inside,
                    terms=scale.shape[2:],
                    clamps=clip is not None and clip.clamps,
                    carries=carry is not None,
                    carry_rounded=carry is not None and carry.rounded,
                )
            loop = loops[inside, known]
            u = triangular_inverse(r[start:reach, start:reach])
            loop.u.copy_(u)
            # the columns before are W - W_q
            loop.live.copy_(torch.addmm(w[start:reach], u.T, r[:start, start:reach].T @ w[:start]))
            p = None if carry is None or solver is None else carry.rows(solver, order, start, end)
            if p is not None and loop.p is not None and loop.rest is not None:
                loop.p.copy_(p[:, :known])
                loop.rest.copy_(w[start:end])
            for first, stop in pairwise(sorted({start, end, *(begun if fresh_ranges else ())})):
                for j in (j for j in begun if first <= j < stop):
                    g, seen = turns[j // width], loop.live[j - start : j - start + width].T
                    if fitted is not None:
                        fitted.fit(g, seen, order[j : j + width])
                        column_scale = fitted.column[order]
                        continue
                    bounds = ranges(seen[:, None], grid, clip, order[None, j : j + width])
                    lo[g], hi[g] = (bound[:, 0, 0] for bound in bounds)
                    scale[g], zero_point[g] = grid.from_range(lo[g], hi[g])
                own, of = slice(first - start, stop - start), group_of_column[first:stop]
                loop.scale[own] = scale[of] if column_scale is None else scale[of] * column_scale[first:stop, None]
                loop.zero_point[own] = zero_point[of]
                for bound, limit in zip(loop.bounds, (lo, hi), strict=False):
                    bound[own] = limit[of]
                loop.run(own.start, own.stop)
            codes[:, order[start:end]] = loop.codes.T
            w[start:end] = (w[start:end] if loop.rest is None else loop.rest) - loop.nearest
            if p is not None:
                w[end:].addmm_(p[:, inside:].T, loop.carried[:inside])

    for loop in loops.values():
        loop.release()
    if fitted is not None:
        return fitted.rounded(codes, notes)
    return QuantizedWeight(codes, scale.T.contiguous(), zero_point.T.contiguous(), group_index, grid, notes)


def column_order(diagonal_I: Tensor, width: int, settings: ColumnSettings) -> Tensor:
    """The inputs [I] in the order in which their columns are rounded, given diag H and the width of a group.

    Raises ValueError for `group_order` with a last group that is shorter than the others.
    """
    if settings.act_order:
        return torch.argsort(diagonal_I, descending=True, stable=True)
    order = torch.arange(len(diagonal_I), device=diagonal_I.device)
    if not settings.group_order:
        return order
    if len(diagonal_I) % width:
        raise ValueError(f"group_order needs groups of one width, but {width} does not divide {len(diagonal_I)} inputs")
    by_group_GW, inside_GW = diagonal_I.view(-1, width).sort(dim=1, descending=True, stable=True)
    groups = torch.argsort(by_group_GW[:, 0], descending=True, stable=True)
    return order.view(-1, width).gather(1, inside_GW)[groups].flatten()
