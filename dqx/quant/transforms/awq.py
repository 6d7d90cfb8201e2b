"""AWQ's scales: input channels that carry large activations are multiplied up before rounding, so that they lose less.

Lin et al. 2024, arXiv:2306.00978, section 3.2: `s = mean|X|^r` per input channel, divided by `sqrt(max s * min s)`,
with r on a grid over [0, 1) chosen by the error that rounding `W * s` (and dividing the result by s) makes in the
output of a judge. At attn_out and mlp_out the judge is the linear itself, at attn_in the attention sublayer and at
mlp_in the gated MLP, all on their recorded inputs. All searches are made on the original weights, then all scales are
folded in.

The code of the study judges LLaDA's attn_in and mlp_in by the whole block, fed with the site's input, which is
normalised already, as if it were the residual stream (`judge: block`); the default follows the paper. Where heads are
grouped, v cannot take over a factor per query head and attn_out is left alone, as in the authors' code.

Where calibration tokens have weights (`token_weight.py`), the mean and the judges' squared errors are weighted by them.

Work is saved where that is exact: a linear's own error needs only X^T X once there are more tokens than inputs, and a
candidate is given up when the part of its error found so far exceeds the best whole one.

R = candidates, O = outputs, I = inputs, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dqx.formats.chunks import row_slices
from dqx.formats.integers import Grid, extremes, wide
from dqx.formats.weight import consecutive_groups, group_width
from dqx.models.transformer import Block
from dqx.quant.activations_store import Row
from dqx.quant.protocols import Context, Tables, choice_problems, own_tables
from dqx.quant.stats import TokenWeights, weighted_rows
from dqx.quant.transforms.channel_scale import scale_site
from dqx.quant.transforms.smooth import column_absmax, scaled_sites, site_problems

SMALLEST = 1e-4  # scales below are raised to it before they are normalised
JUDGES = ("sublayer", "block")
JUDGED_ROWS = 256  # rows of a linear whose error is computed at a time
TILE = 512  # columns of X^T X multiplied at a time
MLP_TOKENS = 256  # tokens that the MLP judges at a time

#: Squared output error of a channel scale [I]; a part of it that exceeds the second argument may be returned instead.
Judge = Callable[[Tensor, float], float]
Grids = Mapping[str, tuple[Grid, int]]  # by role: grid and group size


@dataclass(frozen=True)
class AWQScale:
    """The search for AWQ's channel scales."""

    n_grid: int = 20  # exponents r = 0, 1/n, ... (n-1)/n
    judge: str = "sublayer"  # at attn_in and mlp_in: sublayer, or block as in the study's code for LLaDA
    sites: list[str] | None = None  # of SCALED; None: all
    stream: str = "fp"
    scope: ClassVar[str] = "block"

    @property
    def candidates(self) -> int:
        return self.n_grid

    @property
    def needs(self) -> Mapping[str, frozenset[str]]:
        return {site: frozenset({"inputs", "absmean", "weights"}) for site in scaled_sites(self.sites)}

    @torch.no_grad()
    def apply(self, block: Block, stats: Mapping[str, Mapping[str, Any]], context: Context) -> None:
        scales = {}
        for site in self.needs:
            grids = {role: context.grid(role) for role in block.arch.sites[site]}
            rounded = {role: grid for role, grid in grids.items() if grid is not None}
            if rounded and (site != "attn_out" or block.arch.n_kv_heads == block.arch.n_heads):
                scales[site] = self.search(block, site, stats[site], rounded, context)[0]
        for site, scale in scales.items():
            scale_site(block, site, scale)

    @torch.no_grad()
    def search(
        self, block: Block, site: str, stats: Mapping[str, Any], grids: Grids, context: Context, *, give_up: bool = True
    ) -> tuple[Tensor, list[float]]:
        """The best scale [I] of a site and the mean squared error of every candidate.

        With `give_up` the errors of candidates worse than the best may be too small, but stay larger than the best.
        """
        inputs: Row = stats["inputs"]
        weights: TokenWeights = stats.get("weights")
        weight: Tensor = getattr(block, block.arch.sites[site][0]).weight
        candidates = channel_scales(stats["absmean"].to(wide(weight).dtype), self.n_grid)
        if site in ("attn_out", "mlp_out"):
            judge = linear_judge(weight, *grids[block.arch.sites[site][0]], inputs, weights)
        else:
            judge = module_judge(block, site, grids, self.judge, inputs, context, weights)
        losses = try_all(judge, candidates, give_up=give_up)
        n_outputs = block.arch.hidden_size * sum(x.shape[:-1].numel() for x in inputs)
        best = min(range(len(losses)), key=losses.__getitem__)  # the first of equals
        return candidates[best], [loss / n_outputs for loss in losses]

    def problems(self, where: str, context: Context) -> list[str]:
        problems = site_problems(self.sites, where) + choice_problems(f"{where}.judge", self.judge, JUDGES)
        if all(context.method.rounding_of(role) is None for role in context.arch.roles):
            problems.append(
                f"{where} searches scales for rounded weights, but method.rounding is null; set it, or leave it out"
            )
        if self.n_grid < 1:
            problems.append(f"{where}.n_grid={self.n_grid} must be at least 1; 20 is usual")
        return problems


def channel_scales(absmean_I: Tensor, n_grid: int) -> Tensor:
    """All candidates [R, I] for the mean |x| of every channel; the first is 1 everywhere."""
    exponents = torch.arange(n_grid, dtype=absmean_I.dtype, device=absmean_I.device) / n_grid
    scales = absmean_I.pow(exponents[:, None]).clamp(min=SMALLEST)
    return scales / (scales.amax(1, keepdim=True) * scales.amin(1, keepdim=True)).sqrt()


def rescaled_rounding(w_OI: Tensor, scale_I: Tensor, grid: Grid, group_size: int) -> Tensor:
    """`Q(W * s) / s` [O, I], in float32 (float64 for float64 weights). The group size must divide I."""
    n_out, n_in = w_OI.shape
    groups, group_index = (-1, group_width(n_in, group_size)), consecutive_groups(n_in, group_size, w_OI.device)
    rounded = torch.empty_like(wide(w_OI))
    for rows in row_slices(n_out, n_in, w_OI.device):
        scaled = wide(w_OI[rows]) * scale_I
        lo, hi = extremes(scaled.unflatten(1, groups))
        scale, zero_point = (t[:, group_index] for t in grid.from_ranges(lo.squeeze(-1), hi.squeeze(-1)))
        torch.div(grid.nearest(scaled, scale, zero_point), scale_I, out=rounded[rows])
    return rounded


def try_all(judge: Judge, candidates: Tensor, *, give_up: bool = True) -> list[float]:
    """The squared error of every candidate [R, I], from the middle of the grid outwards."""
    losses, best = [0.0] * len(candidates), float("inf")
    for r in sorted(range(len(candidates)), key=lambda r: abs(r - len(candidates) // 2)):
        losses[r] = judge(candidates[r], best if give_up else float("inf"))
        best = min(best, losses[r])
    return losses


def linear_judge(w_OI: Tensor, grid: Grid, group_size: int, inputs: Row, weights: TokenWeights = None) -> Judge:
    """Judges a linear by its own output on inputs [1, T, I]."""
    n_in = w_OI.shape[1]
    n_tokens = sum(x.shape[:-1].numel() for x in inputs)
    square = doubled_upper_half(gram(inputs, weights)) if n_tokens > (n_in + TILE) / 2 else None
    rows_NI = None if square is not None else torch.cat(list(weighted_rows(inputs, weights)))
    top_I = column_absmax([w_OI])  # what grids with a scale per tensor go by

    def loss(scale_I: Tensor, bound: float) -> float:
        total, scaled_grid = 0.0, grid.for_tensor(top_I * scale_I)
        for w in w_OI.split(JUDGED_ROWS):
            change = rescaled_rounding(w, scale_I, scaled_grid, group_size) - w
            if square is not None:
                total += quadratic_form(change, square)
            elif rows_NI is not None:
                total += (change @ rows_NI.T).square().sum(dtype=torch.float64).item()
            if total > bound:
                break
        return total

    return loss


def gram(inputs: Row, weights: TokenWeights = None) -> Tensor:
    """`X^T X` [I, I] of inputs [1, T, I], their tokens weighted."""
    n_in = inputs[0].shape[-1]
    total = torch.zeros(n_in, n_in, dtype=wide(inputs[0]).dtype, device=inputs[0].device)
    for rows in weighted_rows(inputs, weights):
        total.addmm_(rows.T, rows)
    return total


def doubled_upper_half(gram_II: Tensor) -> Tensor:
    """In place: twice the tiles above the diagonal, which stand for those below it as well."""
    for start in range(TILE, len(gram_II), TILE):
        gram_II[:start, start : start + TILE] *= 2
    return gram_II


def quadratic_form(change_OI: Tensor, doubled_II: Tensor) -> float:
    """`tr(D G D^T)` for a change D of the weight and a Gram matrix G from `doubled_upper_half`: half the products."""
    total = 0.0
    for start in range(0, len(doubled_II), TILE):
        end = min(start + TILE, len(doubled_II))
        part = (change_OI[:, :end] @ doubled_II[:end, start:end]).mul_(change_OI[:, start:end])
        total += part.sum(dtype=torch.float64).item()
    return total


def module_judge(
    block: Block, site: str, grids: Grids, judge: str, inputs: Row, context: Context, weights: TokenWeights = None
) -> Judge:
    """Judges the linears at attn_in or mlp_in by the output of their sublayer, or of the whole block."""

    def kept(tensors: Iterable[Tensor]) -> Row:
        row = context.store.row()
        for tensor in tensors:
            row.append(tensor)
        return row

    def tables(i: int, x: Tensor) -> Tables:
        return own_tables(block.arch, x) if context.tables is None else context.tables(i)

    def attention(i: int, x: Tensor) -> Tensor:
        return block.attention(x, *tables(i, x))

    def whole_block(i: int, x: Tensor) -> Tensor:
        return block(x, *tables(i, x))

    def mlp(i: int, x: Tensor) -> Tensor:
        return block.mlp(x)

    forward, transformed = mlp if site == "mlp_in" else attention, judge == "sublayer"
    if judge == "block" and site == "attn_in":
        forward = whole_block
    elif judge == "block":  # what comes before the MLP is the same for all candidates
        inputs = kept(block.mlp_norm(x + attention(i, block.attn_norm(x))) for i, x in enumerate(inputs))

    def parts(row: Iterable[Tensor]) -> Iterator[Tensor]:
        for x in row:  # tokens do not see each other in the MLP: there a candidate can be given up in between
            yield from x.split(MLP_TOKENS, dim=1) if site == "mlp_in" else (x,)

    matrices = {role: getattr(block, role).weight for role in grids}
    top_I = column_absmax(list(matrices.values()))
    with _replaced(block, {}, site if transformed else None):
        targets = kept(forward(i, x) for i, x in enumerate(parts(inputs)))
    heavy = [None] * len(targets) if weights is None else [part[..., None] for part in parts(weights)]

    def loss(scale_I: Tensor, bound: float) -> float:
        total = 0.0
        scaled_grids = {role: (grid.for_tensor(top_I * scale_I), size) for role, (grid, size) in grids.items()}
        rounded = {role: rescaled_rounding(w, scale_I, *scaled_grids[role]) for role, w in matrices.items()}
        with _replaced(block, rounded, site if transformed else None):
            for i, (x, target, weight) in enumerate(zip(parts(inputs), targets, heavy, strict=True)):
                error = (wide(forward(i, x)) - wide(target)).square()
                total += (error if weight is None else error * weight).sum(dtype=torch.float64).item()
                if total > bound:
                    break
        return total

    return loss


@contextmanager
def _replaced(block: Block, weights: Mapping[str, Tensor], transformed_site: str | None) -> Iterator[None]:
    """Other weights for a while, and no module in front of a site whose input went through it already."""
    kept = {role: getattr(block, role).weight for role in weights}
    in_front = None if transformed_site is None else block.inputs[transformed_site]
    try:
        for role, weight in weights.items():
            getattr(block, role).weight = nn.Parameter(weight.to(kept[role].dtype), requires_grad=False)
        if transformed_site is not None:
            block.inputs[transformed_site] = nn.Identity()
        yield
    finally:
        for role, weight in kept.items():
            getattr(block, role).weight = weight
        if transformed_site is not None and in_front is not None:
            block.inputs[transformed_site] = in_front
