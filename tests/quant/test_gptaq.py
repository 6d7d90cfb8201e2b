"""GPTAQ: equal to GPTQ where it must be, to a literal transcription, and to least squares where that can be solved."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from goldens import FAMILIES, tiny
from tiny import SITES, Batch

from dqx.formats.integers import Grid
from dqx.quant import ActivationBits, BitsConfig, Method, WeightBits, quantize
from dqx.quant.rounding.factor import Solver, upper_factor
from dqx.quant.rounding.gptaq import GPTAQ, carry_rows, gptaq_round
from dqx.quant.rounding.gptq import GPTQ, gptq_round
from dqx.quant.rounding.rtn import rtn_round

ORDERS = [{}, {"act_order": True}, {"static_groups": True}, {"act_order": True, "static_groups": True}]
SETTINGS = [*ORDERS, {"fresh_ranges": True}, {"fresh_ranges": True, "act_order": True}]


def gptq(w, h, grid, group_size=-1, clip=None, **settings):
    return gptq_round(w, h, grid, group_size, clip, GPTQ(**settings))


def gptaq(w, h, d, grid, group_size=-1, clip=None, **settings):
    return gptaq_round(w, h, d, grid, group_size, clip, GPTAQ(**settings))


def problem(n_out=24, n_in=96, seed=0, deviation=0.15, n_tokens=500):
    """A weight [O, I], its input in the quantized and in the full-precision model [I, T], float64.

    The inputs are correlated; they deviate by a fixed linear map (wrong weights upstream) and by noise.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mix = normal(n_in, n_in) / n_in**0.5 + torch.eye(n_in, dtype=torch.float64)
    size = torch.rand(n_in, 1, generator=g, dtype=torch.float64) * 2 + 0.2
    x_fp = size * (mix @ normal(n_in, n_tokens))
    x_q = x_fp + deviation * (normal(n_in, n_in) / n_in**0.5 @ x_fp + size * normal(n_in, n_tokens))
    return normal(n_out, n_in), x_q, x_fp


def statistics(x_q, x_fp):
    """Hessian and cross term, both per token."""
    n_tokens = x_q.shape[1]
    return x_q @ x_q.T / n_tokens, (x_fp - x_q) @ x_q.T / n_tokens


def asymmetric_error(rounded, w, x_q, x_fp):
    return ((rounded.dequantize() @ x_q - w @ x_fp).square().sum() / (w @ x_fp).square().sum()).item()


def equal(a, b):
    same = torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)
    return same and torch.equal(a.group_index, b.group_index)


@pytest.mark.parametrize("group_size", [-1, 32, 40])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_alpha_zero_and_equal_streams_are_gptq(settings, group_size):
    w, x_q, x_fp = problem()
    h, d = statistics(x_q, x_fp)
    plain = gptq(w, h, Grid(3), group_size, chunk=40, **settings)
    assert equal(gptaq(w, h, d, Grid(3), group_size, chunk=40, alpha=0.0, **settings), plain)
    _, nothing = statistics(x_q, x_q)
    for alpha in (0.25, 1.0):
        assert equal(gptaq(w, h, nothing, Grid(3), group_size, chunk=40, alpha=alpha, **settings), plain)
    assert not equal(gptaq(w, h, d, Grid(3), group_size, chunk=40, alpha=1.0, **settings), plain)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_identity_hessian_and_equal_streams_are_rtn(settings):
    w, _, _ = problem()
    eye = torch.eye(96, dtype=torch.float64)
    plain = rtn_round(w, Grid(3), 32)
    ours = gptaq(w, 3 * eye, 0 * eye, Grid(3), 32, chunk=40, **settings)
    assert torch.equal(ours.codes, plain.codes)
    torch.testing.assert_close(ours.scale, plain.scale)


def test_weights_on_the_grid_survive_equal_streams():
    w, x_q, _ = problem()
    h, nothing = statistics(x_q, x_q)
    on_grid = rtn_round(w, Grid(3), 32).dequantize()
    again = gptaq(on_grid, h, nothing, Grid(3), 32)
    torch.testing.assert_close(again.dequantize(), on_grid)


def test_each_row_of_p_is_a_least_squares_solution():
    """P[j, >j] is the combination of later quantized inputs closest to the deviation of input j; D^T would not do."""
    _, x_q, x_fp = problem(n_in=24)
    h, d = statistics(x_q, x_fp)
    solver = Solver(upper_factor(h, 0.0)[0])
    p = carry_rows(d.clone(), solver, 0, 1.0)
    assert torch.equal(p, p.triu(1))
    for j in range(23):
        best = torch.linalg.lstsq(x_q[j + 1 :].T, (x_fp - x_q)[j]).solution
        torch.testing.assert_close(p[j, j + 1 :], best)
        assert (carry_rows(d.T.contiguous(), solver, 0, 1.0)[j, j + 1 :] - best).abs().max() > 1e-3
    torch.testing.assert_close(carry_rows(d.clone(), solver, 0, 0.25), p / 4)
    for start in (1, 7, 23):
        rows = carry_rows(d[start : start + 5, start:].clone(), solver, start, 1.0)
        torch.testing.assert_close(rows, p[start : start + 5, start:])


def test_columns_left_free_reach_the_least_squares_optimum():
    """If only the first input deviates and all later columns are as good as unquantized, what GPTAQ returns is the
    least-squares answer to the asymmetric problem given the first column's rounded value; GPTQ's answer is not."""
    w, x_q, x_fp = problem(n_in=12, deviation=0.4)
    x_fp = torch.cat((x_fp[:1], x_q[1:]))
    h, d = statistics(x_q, x_fp)

    class FirstCoarse:
        """Coarse ranges for the first column (its own group), fine ones elsewhere, as one grid of 8 bits."""

        clamps = False

        def __call__(self, w_OGW, grid, columns_GW):
            span = torch.where(columns_GW[:, :1] == 0, 400.0, 12.0).expand(w_OGW.shape[0], -1, 1).to(w_OGW.dtype)
            return -span, span

    grid = Grid(8)
    settings = {"group_size": 1, "clip": FirstCoarse(), "static_groups": True, "damping": 0.0}
    ours = gptaq(w, h, d, grid, alpha=1.0, **settings).dequantize()
    symmetric = gptq(w, h, grid, **settings).dequantize()
    first = ours[:, :1]
    assert (first - w[:, :1]).abs().max() > 0.5
    assert torch.equal(first, symmetric[:, :1])
    best = torch.linalg.lstsq(x_q[1:].T, (w @ x_fp - first @ x_q[:1]).T).solution.T
    assert (ours[:, 1:] - best).abs().max() < 0.25  # a fine step is 24 / 255, and its error is fed back too
    errors = [(full @ x_q - w @ x_fp).square().mean() for full in (torch.cat((first, best), 1), ours, symmetric)]
    assert errors[1] < 1.15 * errors[0]
    assert errors[2] > 2 * errors[0]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_closer_to_the_full_precision_output_than_gptq(settings, bits):
    totals = {}
    for seed in range(3):
        w, x_q, x_fp = problem(n_out=32, seed=seed, deviation=0.3)
        h, d = statistics(x_q, x_fp)
        for alpha in (0.0, 0.25, 1.0):
            rounded = gptaq(w, h, d, Grid(bits), 32, alpha=alpha, **settings)
            totals[alpha] = totals.get(alpha, 0.0) + asymmetric_error(rounded, w, x_q, x_fp)
        turned = gptaq(w, h, d.T, Grid(bits), 32, alpha=1.0, **settings)
        totals["turned"] = totals.get("turned", 0.0) + asymmetric_error(turned, w, x_q, x_fp)
    assert totals[1.0] < totals[0.25] < totals[0.0] < totals["turned"]


def literal_gptaq(w, h, d, bits, group_size, alpha, blocksize, act_order):
    """The authors' algorithm step by step with groups read on the way; no dead columns."""
    n_in = w.shape[1]
    order = torch.argsort(h.diagonal(), descending=True) if act_order else torch.arange(n_in)
    w, h, d = w[:, order].clone(), h[order][:, order].clone(), d[order][:, order]
    h += 0.01 * h.diagonal().mean() * torch.eye(n_in, dtype=h.dtype)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    p = alpha * torch.triu(d @ u.T, diagonal=1) @ u
    codes = torch.zeros(w.shape, dtype=torch.long)
    for start in range(0, n_in, blocksize):
        end = min(start + blocksize, n_in)
        block, errors = w[:, start:end].clone(), torch.zeros_like(w[:, start:end])
        for i in range(end - start):
            j = start + i
            if j % group_size == 0:
                group = w[:, j : j + group_size]
                lo, hi = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
                scale = (hi - lo) / (2**bits - 1)
                zero = torch.round(-lo / scale)
            column = block[:, i].clone()
            q = torch.clamp(torch.round(column / scale) + zero, 0, 2**bits - 1)
            codes[:, order[j]] = q.long()
            errors[:, i] = (column - scale * (q - zero)) / u[j, j]
            block[:, i:] -= errors[:, i, None] * u[j, j:end] - column[:, None] * p[j, j:end]
        w[:, end:] -= errors @ u[start:end, end:] - block @ p[start:end, end:]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("n_in", "group_size", "blocksize"), [(96, 32, 40), (96, 48, 32), (100, 32, 128), (64, 16, 1)])
def test_equals_a_literal_transcription(n_in, group_size, blocksize, act_order):
    w, x_q, x_fp = problem(n_in=n_in, deviation=0.3)
    h, d = statistics(x_q, x_fp)
    for alpha in (0.25, 1.0):
        codes = literal_gptaq(w, h, d, 3, group_size, alpha, blocksize, act_order)
        settings = {"alpha": alpha, "chunk": blocksize, "act_order": act_order}
        theirs = gptaq(w, h, d, Grid(3), group_size, carry_rounded=True, **settings)
        assert torch.equal(theirs.codes.long(), codes)
    ours = gptaq(w, h, d, Grid(3), group_size, **settings)
    one_chunk = blocksize >= n_in
    assert torch.equal(ours.codes.long(), codes) == one_chunk  # inside one chunk nothing is overwritten


@pytest.mark.parametrize(
    ("group_size", "settings"),
    [
        (-1, {}),
        (-1, {"act_order": True}),
        (32, {"fresh_ranges": True}),
        (40, {"fresh_ranges": True, "act_order": True}),
        (32, {"static_groups": True, "act_order": True}),
    ],
    ids=str,
)
def test_chunk_is_only_speed(group_size, settings):
    w, x_q, x_fp = problem(n_in=120, deviation=0.3)
    h, d = statistics(x_q, x_fp)
    results = [gptaq(w, h, d, Grid(3), group_size, alpha=1.0, chunk=c, **settings) for c in (120, 1, 7, 32, 50)]
    for other in results[1:]:
        assert torch.equal(other.codes, results[0].codes)
        torch.testing.assert_close(other.scale, results[0].scale)


@pytest.mark.parametrize("group_size", [-1, 32])
def test_act_order_does_not_depend_on_the_order_of_inputs(group_size):
    w, x_q, x_fp = problem(deviation=0.3)
    h, d = statistics(x_q, x_fp)
    shuffle = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    settings = {"alpha": 1.0, "act_order": True}
    straight = gptaq(w, h, d, Grid(3), group_size, **settings)
    shuffled = gptaq(w[:, shuffle], *statistics(x_q[shuffle], x_fp[shuffle]), Grid(3), group_size, **settings)
    assert torch.equal(shuffled.codes, straight.codes[:, shuffle])
    assert torch.equal(shuffled.group_index, straight.group_index[shuffle])


def test_the_number_of_tokens_cancels_and_rows_are_independent():
    w, x_q, x_fp = problem()
    h, d = statistics(x_q, x_fp)
    reference = gptaq(w, h, d, Grid(3), 32, alpha=1.0, act_order=True)
    for factor in (500.0, 1e-6):
        same = gptaq(w, factor * h, factor * d, Grid(3), 32, alpha=1.0, act_order=True)
        assert torch.equal(same.codes, reference.codes)
    for part, rows in zip(reference.split([10, 14]), w.split([10, 14]), strict=True):
        assert torch.equal(part.codes, gptaq(rows, h, d, Grid(3), 32, alpha=1.0, act_order=True).codes)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_dead_inputs(settings):
    """An input that is always 0 in the quantized model gets weight 0, even where the full-precision model uses it."""
    w, x_q, x_fp = problem(deviation=0.3)
    dead = [3, 40, 95]
    x_q[dead] = 0
    h, d = statistics(x_q, x_fp)
    rounded = gptaq(w, h, d, Grid(4), 32, alpha=1.0, **settings)
    assert (rounded.dequantize()[:, dead] == 0).all()
    assert torch.isfinite(rounded.dequantize()).all()


def test_bad_cross_terms():
    w, x_q, x_fp = problem()
    h, d = statistics(x_q, x_fp)
    with pytest.raises(ValueError, match="shape"):
        gptaq(w, h, d[:95], Grid(4))
    d[0, 0] = float("nan")
    with pytest.raises(ValueError, match="overflowed"):
        gptaq(w, h, d, Grid(4))


# ---- in whole models ------------------------------------------------------------------------------------------


def w(bits):
    return BitsConfig(f"w{bits}a16", WeightBits(bits, 32), ActivationBits())


def sequences(n=6, length=24, seed=2):
    return torch.randint(0, 96, (n, length), generator=torch.Generator().manual_seed(seed))


def quantized(family, method, bits, dtype=torch.float32, ids=None):
    model = tiny(family, dtype)
    quantize(model, method, w(bits), [Batch(sequences() if ids is None else ids)], progress=False)
    return model


@torch.no_grad()
def logits(model, ids=None):
    return model(sequences() if ids is None else ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_with_alpha_zero_are_gptq(family):
    ours, plain = quantized(family, Method("m", GPTAQ(alpha=0.0)), 3), quantized(family, Method("m", GPTQ()), 3)
    assert torch.equal(logits(ours), logits(plain))
    assert not torch.equal(logits(quantized(family, Method("m", GPTAQ()), 3)), logits(plain))


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_closer_than_with_gptq(family, bits):
    """On the calibration tokens, with more of them than a linear has inputs."""
    many = sequences(10, 32)
    original = logits(tiny(family), many)

    def error(rounding):
        return (logits(quantized(family, Method("m", rounding), bits, ids=many), many) - original).square().mean()

    assert error(GPTAQ()) < 0.97 * error(GPTQ())


@dataclass(frozen=True)
class Kept(GPTAQ):
    """GPTAQ that keeps the statistics it was given."""

    seen: ClassVar[list] = []

    def __call__(self, w_OI, bits, stats, clip=None):
        self.seen.append(stats)
        return super().__call__(w_OI, bits, stats, clip)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_gives_statistics_of_both_models(family):
    """Hessian and cross term of every site, recomputed from the finished and the original model."""
    Kept.seen.clear()
    finished, original = quantized(family, Method("m", Kept()), 3, torch.float64), tiny(family, torch.float64)
    at = 0
    for block in range(len(original.blocks)):
        for roles in SITES.values():
            inputs = []
            for model in (finished, original):
                found = []
                linear = getattr(model.blocks[block], roles[0])
                handle = linear.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0]))
                logits(model)
                handle.remove()
                inputs.append(found[0].flatten(0, 1))
            x_q, x_fp = inputs
            torch.testing.assert_close(Kept.seen[at]["hessian"], x_q.T @ x_q / len(x_q))
            torch.testing.assert_close(Kept.seen[at]["cross"], (x_fp - x_q).T @ x_q / len(x_q))
            at += 1
    assert at == len(Kept.seen)


def test_settings_are_checked(setting):
    assert GPTAQ().problems("method.rounding", setting) == []
    found = GPTAQ(alpha=1.5, damping=-1, chunk=0, static_groups=True, fresh_ranges=True).problems("here", setting)
    assert len(found) == 4
    assert all("here." in problem for problem in found)
    assert any("here.alpha=1.5" in problem for problem in found)
