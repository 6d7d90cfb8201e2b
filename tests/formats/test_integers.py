"""Uniform grids, the Hessian and the activation quantizer: formulas, guards and identities."""

import pytest
import torch

from dqx.formats.bits import ActivationBits
from dqx.formats.integers import Grid
from dqx.formats.weight import group_ranges, group_width
from dqx.quant.activation import PerToken
from dqx.quant.rounding.rtn import rtn_round
from dqx.quant.stats import CHUNK_TOKENS, PANEL, Hessian

GRIDS = [
    Grid(bits, symmetric, include_zero, exact_absmax)
    for bits in (2, 3, 4, 8)
    for symmetric, include_zero, exact_absmax in [
        (False, True, False),
        (False, False, False),
        (True, True, False),
        (True, True, True),
    ]
]


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("grid", "row", "scale", "zero_point", "codes"),
    [
        (Grid(2), [-1.0, 0.0, 0.6, 2.0], 1.0, 1, [0, 1, 2, 3]),
        (Grid(2), [3.0, 6.0, 4.0, 1.4], 2.0, 0, [2, 3, 2, 1]),  # 3.0 is half way between 1 and 2: to even
        (Grid(2, include_zero=False), [3.0, 6.0, 4.0, 5.0], 1.0, -3, [0, 3, 1, 2]),
        (Grid(3, symmetric=True), [-1.0, 3.5, 0.2, 1.4], 1.0, 4, [3, 7, 4, 5]),
        (Grid(3, symmetric=True), [0.0, 3.5, 1.0, 7.0], 1.0, 4, [4, 7, 5, 7]),  # no negative value: lo stays 0
        (Grid(3, symmetric=True), [-7.0, -3.5, -1.0, 0.0], 2.0, 4, [0, 2, 4, 4]),
        (Grid(3, symmetric=True, exact_absmax=True), [-6.0, 3.0, 2.2, 0.0], 2.0, 4, [1, 6, 5, 4]),
    ],
)
def test_formulas(grid, row, scale, zero_point, codes):
    x = torch.tensor([row])
    got_scale, got_zero = grid.fit(x)
    assert got_scale.item() == pytest.approx(scale)
    assert got_zero.item() == zero_point
    assert grid.codes(x, got_scale, got_zero).tolist() == [codes]
    torch.testing.assert_close(
        grid.dequantize(torch.tensor([codes]), got_scale, got_zero), scale * (torch.tensor([codes]) - zero_point)
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    "row",
    [
        [0.0, 0.0, 0.0],
        [2.5, 2.5, 2.5],
        [-2.5, -2.5, -2.5],
        [1e-45, 0.0, 0.0],
        [1e-38, -1e-38, 0.0],
        [1e30, -1e30, 1.0],
        [5.0, 6.0, 7.0],
        [-7.0, -6.0, -5.0],
    ],
    ids=str,
)
def test_degenerate_ranges_stay_finite(grid, row):
    x = torch.tensor([row])
    scale, zero_point = grid.fit(x)
    assert (scale > 0).all()
    codes = grid.codes(x, scale, zero_point)
    assert codes.min() >= 0
    assert codes.max() <= grid.max_code
    back = grid.dequantize(codes, scale, zero_point)
    assert torch.isfinite(back).all()
    if len(set(row)) == 1 and not grid.symmetric:  # a constant is exactly representable
        torch.testing.assert_close(back, x, atol=0, rtol=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_values_on_the_grid_survive(grid):
    x = values(16, 64)
    scale, zero_point = grid.fit(x)
    codes = grid.codes(x, scale, zero_point)
    assert torch.equal(grid.codes(grid.dequantize(codes, scale, zero_point), scale, zero_point), codes)


@pytest.mark.parametrize("grid", [g for g in GRIDS if not g.symmetric or g.exact_absmax], ids=str)
def test_error_is_at_most_half_a_step(grid):
    x = values(32, 64)
    scale, _ = grid.fit(x)
    # an asymmetric zero point is rounded, which can push one end of the range half a step further out
    limit = 0.5 if grid.symmetric else 1.0
    assert ((grid.fake(x) - x).abs() <= limit * scale * (1 + 1e-4)).all()


@pytest.mark.parametrize("include_zero", [True, False])
def test_zero_survives_where_the_range_holds_it(include_zero):
    x = torch.cat((values(8, 31), torch.zeros(8, 1)), 1)
    for bits in (2, 4, 8):
        assert (Grid(bits, include_zero=include_zero).fake(x)[:, -1] == 0).all()


def test_sixteen_bits_is_the_identity():
    x = values(4, 8)
    assert Grid(16).fake(x) is x
    assert PerToken()(x, ActivationBits(16)) is x
    with pytest.raises(ValueError, match="not quantized"):
        Grid(16).fit(x)


def test_float64_stays_and_bfloat16_is_rounded_in_float32():
    assert Grid(4).fit(values(2, 8, dtype=torch.float64))[0].dtype == torch.float64
    x = values(2, 64).bfloat16()
    assert Grid(4).fit(x)[0].dtype == torch.float32
    assert Grid(4).fake(x).dtype == torch.bfloat16
    assert torch.equal(Grid(4).fake(x), Grid(4).fake(x.float()).bfloat16())


@pytest.mark.parametrize(("n_in", "group_size"), [(64, 16), (64, -1), (64, 64), (72, 16), (8, 16)])
def test_groups_are_separate_rows(n_in, group_size):
    w, grid = values(5, n_in), Grid(3)
    whole = rtn_round(w, grid, group_size)
    width = n_in if group_size == -1 else group_size
    for g, part in enumerate(w.split(width, dim=1)):
        alone = rtn_round(part.contiguous(), grid)
        assert torch.equal(whole.codes[:, g * width : (g + 1) * width], alone.codes)
        assert torch.equal(whole.scale[:, g : g + 1], alone.scale)
        assert torch.equal(whole.zero_point[:, g : g + 1], alone.zero_point)
    assert whole.scale.shape[1] == -(-n_in // width) == group_ranges(w, grid, group_size)[0].shape[1]


@pytest.mark.parametrize("group_size", [0, -2])
def test_impossible_group_size(group_size):
    with pytest.raises(ValueError, match="group_size"):
        group_width(64, group_size)


def test_hessian_is_the_mean_outer_product_however_tokens_arrive():
    x = values(6, 40, 24)
    rows = x.reshape(-1, 24).double()
    expected = (rows.T @ rows / len(rows)).float()
    for pieces in ([x], x.split(1), x.reshape(-1, 24).split([7, 100, 133])):
        hessian = Hessian()
        for piece in pieces:
            hessian.add(piece)
        torch.testing.assert_close(hessian.value(), expected, atol=1e-5, rtol=1e-5)


def test_hessian_in_panels():
    """Wider than two panels: the half that is computed and the half that is copied."""
    x = values(40, 2 * PANEL + 7)
    hessian = Hessian()
    hessian.add(x)
    torch.testing.assert_close(hessian.value(), (x.double().T @ x.double() / 40).float(), atol=1e-5, rtol=1e-5)


def test_hessian_chunks_and_dtypes():
    x = values(CHUNK_TOKENS + 5, 3)
    hessian, low = Hessian(), Hessian()
    hessian.add(x.double())
    torch.testing.assert_close(hessian.value(), x.double().T @ x.double() / len(x))
    low.add(x.bfloat16())
    torch.testing.assert_close(low.value(), (x.bfloat16().double().T @ x.bfloat16().double() / len(x)).float())
    with pytest.raises(ValueError, match="calibration"):
        Hessian().value()


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_token_has_its_own_grid(symmetric):
    bits = ActivationBits(4, symmetric)
    x = values(2, 5, 32)
    louder = x.clone()
    louder[1, 2] *= 100
    a, b = PerToken()(x, bits), PerToken()(louder, bits)
    same = torch.ones(2, 5, dtype=torch.bool)
    same[1, 2] = False
    assert torch.equal(a[same], b[same])
    torch.testing.assert_close(b[1, 2], 100 * a[1, 2], rtol=1e-4, atol=0)
    assert torch.equal(a.flatten(0, 1), PerToken()(x.flatten(0, 1), bits))


def test_clip_ratio_saturates_the_ends(setting):
    x = values(4, 64)
    clipped = PerToken(clip_ratio=0.5)(x, ActivationBits(8))
    assert (clipped.amax(-1) <= 0.51 * x.amax(-1)).all()
    inside = (x < 0.45 * x.amax(-1, keepdim=True)) & (x > 0.45 * x.amin(-1, keepdim=True))
    assert (clipped - x)[inside].abs().max() < 0.02
    assert PerToken(clip_ratio=0).problems("method.activation", setting)
    assert not PerToken(clip_ratio=1.0).problems("method.activation", setting)
