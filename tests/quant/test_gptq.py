"""GPTQ against the official implementation's codes, a literal transcription of it, and identities."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dqx.common import accelerator
from dqx.formats.integers import Grid
from dqx.quant.rounding.factor import Solver, factored, triangular_inverse, upper_factor
from dqx.quant.rounding.gptq import GPTQ, gptq_round
from dqx.quant.rounding.rtn import rtn_round
from dqx.quant.stats import Hessian

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "gptq.json").read_text())["cases"]


def gptq(w, h, grid, group_size=-1, clip=None, **settings):
    return gptq_round(w, h, grid, group_size, clip, GPTQ(**settings))


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "gptq_asym.safetensors") | load_file(GOLDEN / "gptq_extra.safetensors")


def problem(n_out=24, n_in=96, seed=0, dtype=torch.float32, positive_rows=0):
    """A weight and the Hessian of correlated inputs of unequal size."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n_out, n_in, generator=g, dtype=torch.float64)
    w[:positive_rows] = w[:positive_rows].abs()
    mix = torch.randn(n_in, n_in, generator=g, dtype=torch.float64) / n_in**0.5 + torch.eye(n_in, dtype=torch.float64)
    x = torch.randn(400, n_in, generator=g, dtype=torch.float64) @ mix
    x *= torch.rand(n_in, generator=g, dtype=torch.float64) * 2 + 0.2
    return w.to(dtype), (x.T @ x / len(x)).to(dtype)


def equal(a, b):
    return (
        torch.equal(a.codes, b.codes)
        and torch.allclose(a.scale, b.scale, rtol=1e-5)
        and torch.equal(a.zero_point, b.zero_point)
    )


def output_error(rounded, w, hessian):
    change = rounded.dequantize() - w
    return (((change @ hessian) * change).sum() / ((w @ hessian) * w).sum()).item()


@pytest.mark.parametrize("own_hessian", [False, True], ids=["their_hessian", "own_hessian"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_codes_equal_official(golden, case, own_hessian):
    hessian = golden["hessian"]
    if own_hessian:
        collector = Hessian()
        collector.add(golden["inputs"])
        hessian = collector.value()
    grid = Grid(case["bits"], case["sym"])
    ours = gptq(
        golden["weight"],
        hessian,
        grid,
        case["group_size"],
        chunk=case["blocksize"],
        act_order=case["desc_act"],
        static_groups=case["static_groups"],
    )
    name = case["name"]
    assert torch.equal(ours.codes, golden[f"{name}.codes"])
    torch.testing.assert_close(ours.scale, golden[f"{name}.scale"], rtol=1e-5, atol=0)
    assert torch.equal(ours.zero_point, golden[f"{name}.zero"])
    assert torch.equal(ours.group_index, golden[f"{name}.g_idx"].long())
    if f"{name}.wq" in golden:
        torch.testing.assert_close(ours.dequantize(), golden[f"{name}.wq"], rtol=1e-5, atol=1e-7)
    assert output_error(ours, golden["weight"], hessian) == pytest.approx(case["output_error_relative"], rel=1e-3)
    plain = rtn_round(golden["weight"], grid, case["group_size"])
    assert output_error(plain, golden["weight"], hessian) == pytest.approx(case["rtn_output_error_relative"], rel=1e-3)


def literal_gptq(w, h, bits, group_size, sym, desc_act, static_groups, blocksize):
    """The official algorithm step by step, one scalar grid at a time; no dead columns."""
    w, h = w.clone(), h.clone()
    n_out, n_in = w.shape

    def fit(part):  # [O, n] -> per row
        lo, hi = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale, zero = torch.empty(n_out, dtype=w.dtype), torch.empty(n_out, dtype=w.dtype)
        for r in range(n_out):
            a, b = lo[r].item(), hi[r].item()
            if sym:
                b = max(-a, b)
                a = -b if a < 0 else a
            scale[r] = (b - a) / (2**bits - 1)
            zero[r] = 2 ** (bits - 1) if sym else torch.round(-torch.tensor(a, dtype=w.dtype) / scale[r])
        return scale, zero

    whole = fit(w)
    fixed = [fit(w[:, g : g + group_size]) for g in range(0, n_in, group_size)] if static_groups else []
    order = torch.argsort(h.diagonal(), descending=True) if desc_act else torch.arange(n_in)
    w, h = w[:, order], h[order][:, order]
    h += 0.01 * h.diagonal().mean() * torch.eye(n_in, dtype=h.dtype)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    codes, groups = torch.zeros(n_out, n_in, dtype=torch.long), []
    for start in range(0, n_in, blocksize):
        end = min(start + blocksize, n_in)
        inside = w[:, start:end].clone()
        errors = torch.zeros_like(inside)
        for j in range(start, end):
            i = j - start
            if group_size == -1:
                scale, zero = whole
            elif static_groups:
                scale, zero = fixed[int(order[j]) // group_size]
            elif j % group_size == 0:
                groups.append(fit(w[:, j : j + group_size]))
                scale, zero = groups[-1]
            q = torch.clamp(torch.round(inside[:, i] / scale) + zero, 0, 2**bits - 1)
            codes[:, order[j]] = q.long()
            errors[:, i] = (inside[:, i] - scale * (q - zero)) / u[j, j]
            inside[:, i:] -= errors[:, i : i + 1] * u[j : j + 1, j:end]
        w[:, end:] -= errors @ u[start:end, end:]
    ranges = [whole] if group_size == -1 else fixed or groups
    return codes, torch.stack([s for s, _ in ranges], 1), torch.stack([z for _, z in ranges], 1)


@pytest.mark.parametrize("sym", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("order", ["left_to_right", "desc_act", "desc_act_static", "static"])
@pytest.mark.parametrize(
    ("n_in", "group_size", "blocksize"),
    [(96, 32, 40), (96, 48, 32), (96, 96, 64), (96, -1, 50), (100, 32, 128), (64, 16, 1), (33, 5, 7)],
)
def test_equals_a_literal_transcription(n_in, group_size, blocksize, order, sym):
    """In float64: widths that chunk and group do not divide, groups larger than a chunk, all-positive rows."""
    w, h = problem(n_out=12, n_in=n_in, dtype=torch.float64, positive_rows=3)
    desc_act, static = order.startswith("desc_act"), order.endswith("static") and group_size != -1
    ours = gptq(w, h, Grid(3, sym), group_size, chunk=blocksize, act_order=desc_act, static_groups=static)
    codes, scale, zero = literal_gptq(w, h, 3, group_size, sym, desc_act, static, blocksize)
    assert (ours.codes.long() != codes).float().mean() == 0
    torch.testing.assert_close(ours.scale, scale)
    assert torch.equal(ours.zero_point, zero)


@pytest.mark.parametrize(
    "settings", [{}, {"act_order": True}, {"static_groups": True}, {"fresh_ranges": True}], ids=str
)
@pytest.mark.parametrize("group_size", [-1, 32, 24])
@pytest.mark.parametrize("symmetric", [False, True])
def test_identity_hessian_is_rtn(settings, group_size, symmetric):
    w, _ = problem()
    grid = Grid(3, symmetric)
    ours = gptq(w, 5 * torch.eye(96), grid, group_size, chunk=40, **settings)
    plain = rtn_round(w, grid, group_size)
    assert equal(ours, plain)
    assert torch.equal(ours.group_index, plain.group_index)


def test_weights_on_the_grid_survive():
    w, h = problem()
    on_grid = rtn_round(w, Grid(3), 32)
    again = gptq(on_grid.dequantize(), h, Grid(3), 32)
    torch.testing.assert_close(again.dequantize(), on_grid.dequantize(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_better_than_rtn_under_its_hessian(bits):
    w, h = problem(n_out=48)
    for group_size in (-1, 32):
        plain = output_error(rtn_round(w, Grid(bits), group_size), w, h)
        for settings in ({}, {"act_order": True}, {"act_order": True, "static_groups": True}, {"fresh_ranges": True}):
            assert output_error(gptq(w, h, Grid(bits), group_size, **settings), w, h) < 0.9 * plain


@pytest.mark.parametrize(
    ("group_size", "settings"),
    [
        (-1, {}),
        (-1, {"act_order": True}),
        (32, {"fresh_ranges": True}),
        (32, {"fresh_ranges": True, "act_order": True}),
        (40, {"fresh_ranges": True}),
        (32, {"static_groups": True}),
        (32, {"static_groups": True, "act_order": True}),
    ],
    ids=str,
)
def test_chunk_is_only_speed(group_size, settings):
    w, h = problem(n_in=120, dtype=torch.float64)
    results = [gptq(w, h, Grid(3), group_size, chunk=chunk, **settings) for chunk in (120, 1, 7, 32, 50, 128)]
    assert all(equal(results[0], other) for other in results[1:])


def test_default_ranges_ignore_updates_inside_a_chunk():
    """As in the authors' code: chunks that start with every group give fresh ranges, larger ones do not."""
    w, h = problem(dtype=torch.float64)
    fresh = gptq(w, h, Grid(3), 32, fresh_ranges=True)
    assert equal(gptq(w, h, Grid(3), 32, chunk=32), fresh)
    assert equal(gptq(w, h, Grid(3), 32, chunk=16), fresh)
    assert not equal(gptq(w, h, Grid(3), 32, chunk=96), fresh)


@pytest.mark.parametrize("static_groups", [False, True])
def test_rows_do_not_see_each_other(static_groups):
    w, h = problem(n_out=24, dtype=torch.float64)
    stacked = gptq(w, h, Grid(3), 32, act_order=True, static_groups=static_groups).split([10, 14])
    for part, rows in zip(stacked, w.split([10, 14]), strict=True):
        assert equal(part, gptq(rows, h, Grid(3), 32, act_order=True, static_groups=static_groups))


def test_act_order_does_not_depend_on_the_order_of_inputs():
    w, h = problem(dtype=torch.float64)
    shuffle = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    for group_size in (-1, 32):
        straight = gptq(w, h, Grid(3), group_size, act_order=True)
        shuffled = gptq(w[:, shuffle], h[shuffle][:, shuffle], Grid(3), group_size, act_order=True)
        assert torch.equal(shuffled.codes, straight.codes[:, shuffle])
        assert torch.equal(shuffled.group_index, straight.group_index[shuffle])
        torch.testing.assert_close(shuffled.scale, straight.scale)
    falling = torch.argsort(h.diagonal(), descending=True)
    w, h = w[:, falling], h[falling][:, falling]
    for static_groups in (False, True):
        assert equal(
            gptq(w, h, Grid(3), 32, act_order=True, static_groups=static_groups),
            gptq(w, h, Grid(3), 32, act_order=False, static_groups=static_groups),
        )


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_inputs_get_zero_and_leave_the_others_alone(act_order):
    w, h = problem(dtype=torch.float64)
    dead = torch.tensor([3, 50, 95])
    alive = torch.tensor([i for i in range(96) if i not in dead.tolist()])
    h[dead], h[:, dead] = 0, 0
    w[:, dead] = 0.5  # inside every range, so per-row grids are those of the others
    rounded = gptq(w, h, Grid(4), -1, damping=0.01, act_order=act_order)
    assert (rounded.dequantize()[:, dead] == 0).all()
    # without the dead inputs the same damping is a share of a mean over fewer inputs
    alone = gptq(w[:, alive], h[alive][:, alive], Grid(4), -1, damping=0.01 * 93 / 96, act_order=act_order)
    assert torch.equal(rounded.codes[:, alive], alone.codes)
    nothing = gptq(w, torch.zeros_like(h), Grid(4), 32)
    assert (nothing.dequantize() == 0).all()


@pytest.mark.parametrize("settings", [{}, {"act_order": True}, {"act_order": True, "static_groups": True}], ids=str)
def test_units_of_the_hessian_do_not_matter(settings):
    w, h = problem(dtype=torch.float64)
    h[7], h[:, 7] = 0, 0
    reference = gptq(w, h, Grid(3), 32, **settings)
    for factor in (1e-6, 2.0, 1e6):
        assert equal(gptq(w, factor * h, Grid(3), 32, **settings), reference)


@pytest.mark.parametrize("n_in", [5, 256, 1300])
def test_factor(n_in):
    """One block, exactly one, several blocks and updates of several columns of blocks."""
    _, h = problem(n_in=n_in, dtype=torch.float64)
    r, notes = upper_factor(h, 0.01)
    assert notes == ()
    assert torch.equal(r, r.triu())
    torch.testing.assert_close(r @ r.T, h + 0.01 * h.diagonal().mean() * torch.eye(n_in))
    inverse = triangular_inverse(r, leaf=7 if n_in < 1000 else 256)
    torch.testing.assert_close(inverse @ r, torch.eye(n_in, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("n_in", [5, 300, 1100])
def test_the_factor_lies_in_the_hessian_itself(n_in):
    """Sizes at which the blocks of the factorisation and the tiles that are kept end at different columns."""
    _, h = problem(n_in=n_in, dtype=torch.float64)
    h = h.tril() + h.tril(-1).T  # to the last bit
    h[:, 1], h[1] = 0, 0
    before = h.clone()
    with factored(h, 0.01) as (r, notes):
        assert notes == ()
        assert r.data_ptr() == h.data_ptr()
        assert torch.equal(r.triu(), upper_factor(before, 0.01)[0])
        solver, x = Solver(r), torch.randn(3, n_in - 2, dtype=torch.float64)
        u = triangular_inverse(r)[2:, 2:]
        torch.testing.assert_close(solver.times_u(x.clone(), 2), x @ u)
        torch.testing.assert_close(solver.times_u_transposed(x.clone(), 2), x @ u.T)
    assert torch.equal(h, before)
    with pytest.raises(RuntimeError, match="interrupted"), factored(h, 0.01):
        raise RuntimeError("interrupted")
    assert torch.equal(h, before)
    h[0, 0] = -2 * h.diagonal().mean()
    before = h.clone()
    with pytest.raises(ValueError, match="cannot be factored"), factored(h, 0.0):
        pass
    assert torch.equal(h, before)


def test_a_failed_factorisation_is_reported():
    w, _ = problem()
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    h = x.T @ x  # rank 5 of 96
    rounded = gptq(w, h, Grid(4), 32, damping=0.0)
    assert torch.isfinite(rounded.dequantize()).all()
    (note,) = rounded.notes
    assert "Cholesky failed in float32" in note
    assert "damping 0.001 instead of 0" in note
    assert gptq(w, h, Grid(4), 32, damping=0.01).notes == ()
    with pytest.raises(ValueError, match="cannot be factored"):
        gptq(w, -torch.eye(96), Grid(4), 32)


def test_bad_hessians():
    w, h = problem()
    with pytest.raises(ValueError, match="96 x 96"):
        gptq(w, h[:95, :95], Grid(4))
    h[0, 0] = float("inf")
    with pytest.raises(ValueError, match="overflowed"):
        gptq(w, h, Grid(4))


def test_settings_are_checked(setting):
    assert GPTQ().problems("method.rounding", setting) == []
    bad = GPTQ(damping=-1, chunk=0, static_groups=True, fresh_ranges=True, stream="both")
    found = bad.problems("method.rounding", setting)
    assert len(found) == 4
    assert all("method.rounding." in p for p in found)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"fresh_ranges": True, "act_order": True}], ids=str)
def test_replayed_graphs_give_the_codes_of_the_plain_loop(settings, monkeypatch):
    """On CUDA; tests/pretend/test_graphs.py does it without."""
    draw = torch.Generator().manual_seed(0)
    w, x = (torch.randn(n, 1024, generator=draw).to("cuda") for n in (256, 2048))
    replayed = gptq(w, x.T @ x, Grid(4), 64, **settings)
    monkeypatch.setattr(accelerator, "RECORDERS", {})
    plain = gptq(w, x.T @ x, Grid(4), 64, **settings)
    assert torch.equal(replayed.codes, plain.codes)
    assert torch.equal(replayed.scale, plain.scale)
