"""Clipping: each search against the same search written out, and what it must and must not do."""

from __future__ import annotations

import pytest
import torch

from dqx.formats import chunks
from dqx.formats.floats import FP8, MXFP4, FloatGrid
from dqx.formats.integers import Grid
from dqx.quant.clip import FixedRatio, OutputMSE, WeightMSE, output_mse_range, triangle, weight_mse_range

GRIDS = {
    "asymmetric": Grid(3),
    "plain_range": Grid(3, include_zero=False),
    "symmetric": Grid(3, symmetric=True),
    "exact_absmax": Grid(4, symmetric=True, exact_absmax=True),
    "eight_bits": Grid(8),
    "fp8": FP8(),
    "mxfp4": MXFP4(),
}


def weights(n_out=6, n_groups=3, width=16, seed=0):
    """Float64, so that no threshold sits on a tie that the order of additions decides."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n_out, n_groups, width, generator=g, dtype=torch.float64)
    w[0] = w[0].abs()  # a row without negative weights
    w[1, 0, 3] = 9.0  # an outlier
    return w


def rounded(grid, w, lo, hi):
    scale, zero_point = grid.from_range(lo, hi)
    if isinstance(grid, FloatGrid):
        return grid.nearest(w, scale, zero_point)
    return scale * (torch.clamp(torch.round(w / scale) + zero_point, 0, grid.max_code) - zero_point)


@pytest.mark.parametrize("name", GRIDS)
def test_weight_mse_is_the_search_written_out(name):
    grid, w = GRIDS[name], weights()
    lo, hi = weight_mse_range(w, grid)
    for o in range(len(w)):
        for g in range(w.shape[1]):
            row, best = w[o, g], (float("inf"), None)
            for i in range(80):
                p = 1 - i / 100
                low, high = (row.min() * p)[None], (row.max() * p)[None]
                error = (rounded(grid, row, low, high) - row).abs().pow(2.4).sum().item()
                if error < best[0]:
                    best = (error, (low, high))
            torch.testing.assert_close(torch.stack((lo[o, g], hi[o, g])), torch.stack(best[1]))
    if name in ("asymmetric", "plain_range", "symmetric"):  # the search did not stop at its first step
        assert (lo > w.amin(-1, keepdim=True)).any()


@pytest.mark.parametrize("n_tokens", [10, 40], ids=["fewer_tokens_than_inputs", "more_tokens_than_inputs"])
@pytest.mark.parametrize("name", ["asymmetric", "plain_range", "exact_absmax"])
def test_output_mse_is_the_search_over_tokens_written_out(name, n_tokens):
    """With columns in any order, as GPTQ hands them over, and groups that it reaches one at a time."""
    grid, w = GRIDS[name], weights()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n_tokens, 48, generator=g, dtype=torch.float64) * (0.2 + torch.rand(48, generator=g).double())
    columns = torch.randperm(48, generator=g).view(3, 16)
    lo, hi = output_mse_range(w, grid, [x], columns)
    for i in range(len(w)):
        for j in range(3):
            row, tokens = w[i, j], x[:, columns[j]]
            best = (float("inf"), None)
            for step in range(10):
                m = row.abs().max() * (1 - step / 20)
                clamped = row.clamp(-m, m)
                q = rounded(grid, clamped, clamped.min()[None], clamped.max()[None])
                error = ((tokens @ q - tokens @ row) ** 2).mean().item()
                if error < best[0]:
                    best = (error, clamped)
            torch.testing.assert_close(lo[i, j, 0], best[1].min())
            torch.testing.assert_close(hi[i, j, 0], best[1].max())
    one = output_mse_range(w[:, 1:2], grid, [x], columns[1:2])
    assert torch.equal(one[0], lo[:, 1:2])
    assert torch.equal(one[1], hi[:, 1:2])


def test_tokens_may_come_in_parts_and_all_of_them_be_looked_at():
    w, columns = weights(), torch.arange(48).view(3, 16)
    x, weight = torch.randn(3, 40, 48, dtype=torch.float64), torch.rand(3, 1, 40, dtype=torch.float64)
    heavy = (x * weight.transpose(1, 2).sqrt()).flatten(0, 1)
    wanted = output_mse_range(w, Grid(3), [heavy], columns)
    stats = {"inputs": list(x.split(1)), "weights": list(weight)}
    for ours, all_at_once in zip(OutputMSE(all_tokens=True)(w, Grid(3), stats, columns), wanted, strict=True):
        assert torch.equal(ours, all_at_once)
    assert OutputMSE(all_tokens=True).needs == {"inputs", "weights"}
    assert OutputMSE().needs == {"weighted_tokens"}


def test_triangle_stands_for_the_tokens():
    x = torch.randn(40, 16, dtype=torch.float64)
    r = triangle(x)
    assert r.shape == (16, 16)
    torch.testing.assert_close(r.T @ r, x.T @ x)
    assert triangle(x[:5]) is not None
    assert torch.equal(triangle(x[:5]), x[:5])


def test_chunks_are_only_about_memory(monkeypatch):
    w, x = weights(n_out=30), torch.randn(60, 48, dtype=torch.float64)
    columns, grid = torch.arange(48).view(3, 16), Grid(4)
    whole = (*weight_mse_range(w, grid), *output_mse_range(w, grid, [x], columns))
    monkeypatch.setattr(chunks, "CPU_ELEMENTS", 70)
    for ours, theirs in zip((*weight_mse_range(w, grid), *output_mse_range(w, grid, [x], columns)), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_fixed_ratio_shrinks_both_ends():
    w = weights()
    lo, hi = FixedRatio(0.8)(w, Grid(4), {}, torch.arange(48).view(3, 16))
    assert torch.equal(lo, w.amin(-1, keepdim=True) * 0.8)
    assert torch.equal(hi, w.amax(-1, keepdim=True) * 0.8)


@pytest.mark.parametrize("clip", [WeightMSE(), OutputMSE(), FixedRatio(1.0)], ids=lambda c: type(c).__name__)
def test_weights_on_the_grid_keep_their_range(clip):
    grid, w = Grid(3), weights()
    on_grid = rounded(grid, w, w.amin(-1, keepdim=True), w.amax(-1, keepdim=True))
    stats = {"weighted_tokens": torch.randn(64, 48, dtype=torch.float64)}
    lo, hi = clip(on_grid, grid, stats, torch.arange(48).view(3, 16))
    torch.testing.assert_close(lo, on_grid.amin(-1, keepdim=True))
    torch.testing.assert_close(hi, on_grid.amax(-1, keepdim=True))


def test_all_zero_groups_and_silent_inputs():
    w = torch.zeros(2, 2, 4)
    w[0, 0] = torch.tensor([0.1, -0.2, 0.3, 0.05])
    for tokens in (torch.zeros(20, 8), torch.randn(20, 8)):
        lo, hi = output_mse_range(w, Grid(4), [tokens], torch.arange(8).view(2, 4))
        assert (lo[1] == 0).all()
        assert (hi[1] == 0).all()
        assert torch.isfinite(torch.cat((lo, hi))).all()
    assert all((bound[1] == 0).all() for bound in weight_mse_range(w, Grid(4)))


def test_less_error_than_no_clip():
    """In the measure that each of them minimises."""
    w, grid = weights(n_out=40), Grid(3)
    x = torch.randn(100, 48, dtype=torch.float64)
    full = torch.aminmax(w, dim=-1, keepdim=True)
    lo, hi = output_mse_range(w, grid, [x], torch.arange(48).view(3, 16))

    def error(q):
        return torch.einsum("ngw,ogw->ogn", x.view(100, 3, 16), q - w).square().sum(-1)

    clipped, plain = error(rounded(grid, w.clamp(lo, hi), lo, hi)), error(rounded(grid, w, *full))
    assert (clipped <= plain + 1e-9).all()
    assert clipped.sum() < 0.95 * plain.sum()
    change = [(rounded(grid, w, *r) - w).abs().pow(2.4).sum(-1) for r in (weight_mse_range(w, grid), full)]
    assert (change[0] <= change[1]).all()


def test_settings_are_checked():
    assert FixedRatio().problems("method.clip", None) == []
    assert "method.clip.ratio=1.2" in FixedRatio(1.2).problems("method.clip", None)[0]
    assert WeightMSE().problems("method.clip", None) == []
    assert len(WeightMSE(n_grid=0, max_shrink=1.0, power=0.0).problems("method.clip", None)) == 3
    assert OutputMSE().problems("method.clip", None) == []
    assert "is none" in OutputMSE(n_grid=1, max_shrink=0.5).problems("method.clip", None)[0]
