"""Clipping: which range of a group of weights is represented. A smaller one has finer steps and saturates at its ends.

Three ways to choose it: a fixed share of the range (DuQuant, Lin et al. 2024, arXiv:2406.01721), the least error of the
weights (GPTQ's and QuaRot's code), the least error of the outputs (AWQ, Lin et al. 2024, arXiv:2306.00978).

O = outputs, G groups of W inputs each, I = inputs, N tokens, R <= W rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dqx.formats.chunks import row_slices
from dqx.formats.integers import Grid, extremes, wide
from dqx.quant.protocols import Clip, Context, Stats
from dqx.quant.stats import weighted_rows


@dataclass(frozen=True)
class FixedRatio:
    """Both ends of every range times `ratio`."""

    ratio: float = 0.8  # share of the range that is kept
    skip_roles: list[str] = field(default_factory=list)  # weights that keep their whole range
    needs: ClassVar[frozenset[str]] = frozenset()
    stream: ClassVar[str] = "fp"
    clamps: ClassVar[bool] = False

    def __call__(self, w_OGW: Tensor, grid: Grid, stats: Stats, columns_GW: Tensor) -> tuple[Tensor, Tensor]:
        lo, hi = extremes(w_OGW)
        return lo * self.ratio, hi * self.ratio

    def problems(self, where: str, context: Context) -> list[str]:
        if 0 < self.ratio <= 1:
            return []
        return [f"{where}.ratio={self.ratio} must lie above 0 and not above 1; 0.8 is DuQuant's, 1.0 clips nothing"]


@dataclass(frozen=True)
class WeightMSE:
    """The shrunk range that changes the weights least; see `weight_mse_range`."""

    n_grid: int = 100  # ranges are shrunk by 1 - i/n_grid
    max_shrink: float = 0.8  # i < max_shrink * n_grid
    power: float = 2.4  # of the change of a weight; above 2 large changes count more
    skip_roles: list[str] = field(default_factory=list)  # weights that keep their whole range
    needs: ClassVar[frozenset[str]] = frozenset()
    stream: ClassVar[str] = "fp"
    clamps: ClassVar[bool] = False

    def __call__(self, w_OGW: Tensor, grid: Grid, stats: Stats, columns_GW: Tensor) -> tuple[Tensor, Tensor]:
        return weight_mse_range(w_OGW, grid, n_grid=self.n_grid, max_shrink=self.max_shrink, power=self.power)

    def problems(self, where: str, context: Context) -> list[str]:
        problems = search_problems(where, self.n_grid, self.max_shrink)
        if self.power <= 0:
            problems.append(f"{where}.power={self.power} must be positive; 2.4 is usual, 2 is the squared error")
        return problems


@dataclass(frozen=True)
class OutputMSE:
    """The clamp that changes a group's part of the outputs least; see `output_mse_range`.

    Not meant for q and k: their errors meet in a product and a softmax, which an error of the outputs does not see.
    """

    n_grid: int = 20  # thresholds are absmax * (1 - i/n_grid)
    max_shrink: float = 0.5  # i < max_shrink * n_grid
    skip_roles: list[str] = field(default_factory=lambda: ["q", "k"])  # weights that keep their whole range
    stream: str = "fp"
    all_tokens: bool = False  # of the calibration text; false: 512 to 1023 of them, as in the authors' code
    clamps: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"inputs", "weights"} if self.all_tokens else {"weighted_tokens"})

    def __call__(self, w_OGW: Tensor, grid: Grid, stats: Stats, columns_GW: Tensor) -> tuple[Tensor, Tensor]:
        tokens = weighted_rows(stats["inputs"], stats["weights"]) if self.all_tokens else [stats["weighted_tokens"]]
        return output_mse_range(w_OGW, grid, tokens, columns_GW, n_grid=self.n_grid, max_shrink=self.max_shrink)

    def problems(self, where: str, context: Context) -> list[str]:
        return search_problems(where, self.n_grid, self.max_shrink)


def weight_mse_range(
    w_OGW: Tensor, grid: Grid, *, n_grid: int = 100, max_shrink: float = 0.8, power: float = 2.4
) -> tuple[Tensor, Tensor]:
    """lo, hi [O, G, 1]: min and max times the first `1 - i/n_grid` with the least `sum |Q(w) - w|^power`.

    The search ends where the largest weight alone must be further off than a better range leaves all of them together:
    no grid represents anything two steps beyond its range, and a smaller range only adds to the distance.
    """
    n_out, n_groups, width = w_OGW.shape
    rows_XW = w_OGW.reshape(-1, width)
    share = torch.ones(len(rows_XW), 1, dtype=wide(w_OGW).dtype, device=w_OGW.device)
    for rows in row_slices(len(rows_XW), width, w_OGW.device):
        w = wide(rows_XW[rows])
        lo, hi = extremes(w)
        best = torch.full_like(lo, float("inf"))
        for i in range(steps(n_grid, max_shrink)):
            kept = 1 - i / n_grid
            scale, zero_point = grid.from_range(lo * kept, hi * kept)
            beyond = ((1 - kept) * torch.maximum(-lo, hi) - 2 * scale).clamp_(min=0)
            if (beyond.pow_(power) > best).all():
                break
            change = grid.nearest(w, scale, zero_point).sub_(w)
            error = change.abs_().pow_(power).sum(-1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            share[rows].masked_fill_(better, kept)
    lo, hi = extremes(w_OGW)
    share = share.view(n_out, n_groups, 1)
    return lo * share, hi * share


def output_mse_range(
    w_OGW: Tensor,
    grid: Grid,
    tokens: Iterable[Tensor],
    columns_GW: Tensor,
    *,
    n_grid: int = 20,
    max_shrink: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """lo, hi [O, G, 1] of weights clamped to +-m, `m = absmax * (1 - i/n_grid)` with the first least output error.

    The error of the group's part of an output, `sum over tokens of ((Q(clamp(w)) - w) X^T)^2`, is a quadratic form in
    `X^T X`, so per group a triangular R with `R^T R = X^T X` replaces the tokens, which come in parts [N, I].
    """
    all_lo, all_hi = extremes(w_OGW)
    bound = torch.maximum(-all_lo, all_hi)
    for g, factor_RW in enumerate(triangles(tokens, columns_GW)):
        factor_RW = factor_RW.to(bound.dtype)
        for rows in row_slices(len(w_OGW), w_OGW.shape[2], w_OGW.device):
            w, lo, hi, absmax = wide(w_OGW[rows, g]), all_lo[rows, g], all_hi[rows, g], bound[rows, g].clone()
            best = torch.full_like(absmax, float("inf"))
            for i in range(steps(n_grid, max_shrink)):
                m = absmax * (1 - i / n_grid)
                low, high = torch.maximum(lo, -m), torch.minimum(hi, m)
                change = grid.nearest(torch.clamp(w, low, high), *grid.from_range(low, high)).sub_(w)
                error = (change @ factor_RW.T).square_().sum(-1, keepdim=True)
                better = error < best
                best = torch.where(better, error, best)
                bound[rows, g] = torch.where(better, m, bound[rows, g])
    return torch.maximum(all_lo, -bound), torch.minimum(all_hi, bound)


def steps(n_grid: int, max_shrink: float) -> int:
    return int(max_shrink * n_grid)


def triangles(tokens: Iterable[Tensor], columns_GW: Tensor) -> list[Tensor]:
    """The `triangle` of every group's inputs, of all parts [N, I] of the tokens together."""
    found: list[Tensor] = []
    for x in tokens:
        own = [wide(x[:, columns]) for columns in columns_GW]
        found = (
            [triangle(torch.cat(both)) for both in zip(found, own, strict=True)] if found else list(map(triangle, own))
        )
    return found


def triangle(x_NW: Tensor) -> Tensor:
    """R [R, W] with `R^T R = X^T X`: X itself where it has few rows, else the triangle of its QR factorisation."""
    return x_NW if len(x_NW) <= x_NW.shape[1] else torch.linalg.qr(x_NW, mode="r").R


def search_problems(where: str, n_grid: int, max_shrink: float) -> list[str]:
    """What is wrong with a search over the shares `1 - i/n_grid`, `i < max_shrink * n_grid`."""
    problems = []
    if n_grid < 1:
        problems.append(f"{where}.n_grid={n_grid} must be at least 1")
    if not 0 < max_shrink < 1:
        problems.append(
            f"{where}.max_shrink={max_shrink} must lie between 0 and 1; at 1 nothing would be left of a range"
        )
    elif n_grid >= 1 and steps(n_grid, max_shrink) < 1:
        problems.append(f"{where}.max_shrink={max_shrink} of {where}.n_grid={n_grid} steps is none; raise either")
    return problems


@dataclass(frozen=True)
class ClipAtSite:
    """A clip with the statistics of its site: a `BoundClip`."""

    clip: Clip
    stats: Stats

    @property
    def clamps(self) -> bool:
        return self.clip.clamps

    def __call__(self, w_OGW: Tensor, grid: Grid, columns_GW: Tensor) -> tuple[Tensor, Tensor]:
        return self.clip(w_OGW, grid, self.stats, columns_GW)
