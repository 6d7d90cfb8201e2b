"""Dual scales: least squares at every step, never worse than one scale, and nothing changed in full precision."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from goldens import FAMILIES, tiny
from tiny import Batch

from dqx.formats.bits import RoleBits
from dqx.formats.integers import Grid
from dqx.quant import ActivationBits, BitsConfig, Method, WeightBits, quantize
from dqx.quant.activation import Static
from dqx.quant.clip import OutputMSE, WeightMSE
from dqx.quant.rounding.dual_scale import PRODUCERS, DualScale, column_scale, scaled_statistics
from dqx.quant.rounding.gptaq import GPTAQ
from dqx.quant.rounding.gptq import GPTQ
from dqx.quant.rounding.rtn import RTN, rtn_round
from dqx.quant.transforms.online import HeadRotation, OnlineDown


def problem(n_out=40, n_in=96, spread=0.5, seed=0, dtype=torch.float64):
    """A weight whose columns differ in size, and inputs [T, I] of the quantized and of the full-precision model."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    w = normal(n_out, n_in) * (spread * normal(n_in)).exp()
    x_fp = normal(500, n_in) @ (normal(n_in, n_in) / n_in**0.5 + torch.eye(n_in, dtype=torch.float64))
    x_q = x_fp + 0.1 * normal(500, n_in)
    return w.to(dtype), x_q.to(dtype), x_fp.to(dtype)


def statistics(x_q, x_fp):
    return {"hessian": x_q.T @ x_q / len(x_q), "cross": (x_fp - x_q).T @ x_q / len(x_q)}


def weight_error(w, s, grid, group_size, clip=None):
    return ((w - rtn_round(w / s, grid, group_size, clip).dequantize() * s).square().sum()).item()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_more_iterations_never_raise_the_error_and_some_lower_it(bits, group_size, symmetric):
    w, _, _ = problem()
    grid = Grid(bits, symmetric)
    assert torch.equal(column_scale(w, grid, group_size, iterations=0), torch.ones(96, dtype=torch.float64))
    errors = [weight_error(w, column_scale(w, grid, group_size, iterations=n), grid, group_size) for n in range(16)]
    assert errors[0] == pytest.approx(weight_error(w, 1.0, grid, group_size))
    assert all(later <= earlier for earlier, later in pairwise(errors))
    assert errors[15] < 0.85 * errors[0]


def test_one_step_is_least_squares_for_every_column():
    w, _, _ = problem()
    grid = Grid(3)
    on_grid = rtn_round(w, grid, 32).dequantize()
    s = column_scale(w, grid, 32, iterations=1)
    for j in range(96):
        torch.testing.assert_close(s[j], torch.linalg.lstsq(on_grid[:, j : j + 1], w[:, j : j + 1]).solution[0, 0])


def test_degenerate_columns_keep_a_positive_scale():
    w, x_q, x_fp = problem()
    w[:, 5] = 0
    w[:, 6] *= 1e-30  # all zero on the grid
    w[:, 40] *= 1e4  # the only column its groups can represent
    for include_zero in (True, False):
        s = column_scale(w, Grid(2, include_zero=include_zero), 32)
        assert torch.isfinite(s).all()
        assert (s > 0).all()
    rounded = DualScale()(w, WeightBits(2, 32), statistics(x_q, x_fp))
    assert torch.isfinite(rounded.dequantize()).all()
    nothing = DualScale(rounding=RTN())(torch.zeros(4, 32), WeightBits(2, 32), {})
    assert torch.equal(nothing.column_scale, torch.ones(32))


@pytest.mark.parametrize("inner", [RTN(), GPTQ(), GPTQ(act_order=True), GPTAQ()], ids=lambda part: type(part).__name__)
@pytest.mark.parametrize("bits", [2, 3])
def test_closer_outputs_than_one_scale(inner, bits):
    w, x_q, x_fp = problem()
    stats, setting = statistics(x_q, x_fp), WeightBits(bits, 32)

    def error(result):
        scale = 1.0 if result.column_scale is None else result.column_scale
        return ((x_q @ (result.dequantize() * scale).T - x_fp @ w.T).square().mean() / (x_fp @ w.T).var()).item()

    assert error(DualScale(rounding=inner)(w, setting, stats)) < 0.9 * error(inner(w, setting, stats))


@pytest.mark.parametrize("inner", [GPTQ(act_order=True), GPTAQ(alpha=1.0)], ids=lambda part: type(part).__name__)
def test_the_inner_rounding_gets_what_the_model_multiplies(inner):
    """The same codes as the inner rounding of W / s with statistics measured on the inputs x * s."""
    w, x_q, x_fp = problem()
    setting = WeightBits(3, 32)
    rounded = DualScale(rounding=inner)(w, setting, statistics(x_q, x_fp))
    s = rounded.column_scale
    direct = inner(w / s, setting, statistics(x_q * s, x_fp * s))
    assert torch.equal(rounded.codes, direct.codes)
    torch.testing.assert_close(rounded.scale, direct.scale)
    assert s.max() > 1.1 * s.min()


def test_no_iterations_is_the_inner_rounding():
    w, x_q, x_fp = problem(dtype=torch.float32)
    stats, setting = statistics(x_q, x_fp), WeightBits(3, 32)
    plain, dual = GPTAQ()(w, setting, stats), DualScale(iterations=0)(w, setting, stats)
    assert torch.equal(dual.codes, plain.codes)
    assert torch.equal(dual.column_scale, torch.ones(96))


def test_clipped_ranges():
    """With ranges cut to 60 % the scales still lower the error, and they are fitted to the clipped grid."""

    class Ratio:
        clamps = False

        def __call__(self, w_OGW, grid, columns_GW):
            lo, hi = torch.aminmax(w_OGW, dim=-1, keepdim=True)
            return 0.6 * lo, 0.6 * hi

    w, _, _ = problem()
    s = column_scale(w, Grid(2), 32, Ratio())
    assert weight_error(w, s, Grid(2), 32, Ratio()) < 0.9 * weight_error(w, 1.0, Grid(2), 32, Ratio())
    assert not torch.equal(s, column_scale(w, Grid(2), 32))


def test_folding_into_up_changes_nothing_in_full_precision():
    g = torch.Generator().manual_seed(3)
    gate, up = (torch.randn(96, 24, generator=g, dtype=torch.float64) for _ in range(2))
    down, _, _ = problem()
    s = column_scale(down, Grid(2), 32)
    x = torch.randn(7, 24, generator=g, dtype=torch.float64)
    before = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    after = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up * s[:, None]), down / s)
    torch.testing.assert_close(after, before, atol=1e-12, rtol=1e-12)


def test_folding_into_a_rounded_up_changes_its_scales_only():
    g = torch.Generator().manual_seed(3)
    up = rtn_round(torch.randn(96, 64, generator=g, dtype=torch.float64), Grid(3), 32)
    s = column_scale(problem()[0], Grid(2), 32)
    torch.testing.assert_close(up.dequantize() * s[:, None], rtn_folded(up, s).dequantize())


def rtn_folded(rounded, s):
    return replace(rounded, scale=rounded.scale * s[:, None])


def test_scaled_statistics():
    _, x_q, x_fp = problem()
    s = torch.rand(96, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    ours, measured = scaled_statistics(statistics(x_q, x_fp), s), statistics(x_q * s, x_fp * s)
    for name in ("hessian", "cross"):
        torch.testing.assert_close(ours[name], measured[name])
    assert scaled_statistics({}, s) == {}


# ---- in whole models ------------------------------------------------------------------------------------------


def bits(weight, **overrides):
    setting = BitsConfig(f"w{weight}a16", WeightBits(weight, 32), ActivationBits())
    for role, own in overrides.items():
        setting.overrides[role] = own
    return setting


def sequences():
    return torch.randint(0, 96, (6, 24), generator=torch.Generator().manual_seed(2))


def quantized(family, method, setting, dtype=torch.float32):
    model = tiny(family, dtype)
    report = quantize(model, method, setting, [Batch(sequences())], progress=False)
    return model, report


@pytest.mark.parametrize(("family", "role"), [("llada", "down"), ("dream", "down"), ("llada", "o")])
@pytest.mark.parametrize("producer_bits", [16, 3])
def test_the_fold_preserves_the_function(family, role, producer_bits):
    """The model computes what it would with the scales left in the weight, whether the producer is rounded or not."""
    producer = PRODUCERS[role]
    method = Method("m", RTN(), rounding_by_role={role: DualScale(rounding=RTN())})
    setting = bits(3, **{producer: RoleBits(weight=producer_bits)})
    folded, _ = quantized(family, method, setting, torch.float64)
    plain, _ = quantized(family, Method("m", RTN()), setting, torch.float64)
    with torch.no_grad():
        for ours, reference in zip(folded.blocks, plain.blocks, strict=True):
            ratio = getattr(ours, producer).weight / getattr(reference, producer).weight
            s = ratio.nanmedian(1).values
            torch.testing.assert_close(getattr(ours, producer).weight, getattr(reference, producer).weight * s[:, None])
            assert s.max() > 1.02 * s.min()
            getattr(reference, role).weight.copy_(getattr(ours, role).weight * s)
            if producer_bits < 16:
                assert torch.equal(getattr(ours, producer).codes(), getattr(reference, producer).codes())
        torch.testing.assert_close(folded(sequences()), plain(sequences()), atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_down_is_closer_than_with_one_scale(family):
    """Judged where only down is rounded, and weight columns differ in size as they do in real models."""
    original = tiny(family)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in original.blocks:
            spread = (0.5 * torch.randn(block.down.in_features, generator=g)).exp()
            block.down.weight *= spread
            block.up.weight /= spread[:, None]
    errors = {}
    for width in (2, 3):
        for name, part in (("plain", GPTAQ()), ("dual", DualScale())):
            model = tiny(family)
            model.load_state_dict(original.state_dict())
            method = Method("m", None, rounding_by_role={"down": part})
            report = quantize(model, method, bits(width), [Batch(sequences())], progress=False)
            with torch.no_grad():
                errors[name] = (model(sequences()) - original(sequences())).square().mean().item()
            rows = [row for row in report.linears if row.role == "down"]
            errors[f"{name} weights"] = sum(row.weight_error for row in rows)
            errors[f"{name} outputs"] = sum(row.output_error for row in rows)
        assert errors["dual"] < 0.9 * errors["plain"]
        assert errors["dual weights"] < 0.9 * errors["plain weights"]
        assert errors["dual outputs"] < 0.9 * errors["plain outputs"]


def test_stored_bits_count_no_column_scale():
    plain, dual = (
        quantized("llada", Method("m", RTN(), rounding_by_role={"down": part}), bits(3))[1]
        for part in (RTN(), DualScale(rounding=RTN()))
    )
    assert dual.average_bits == plain.average_bits


def test_bfloat16_codes_survive_the_fold():
    dual = Method("m", RTN(), rounding_by_role={"down": DualScale(rounding=RTN())})
    folded, plain = (quantized("llada", method, bits(5), torch.bfloat16)[0] for method in (dual, Method("m", RTN())))
    ours, reference = folded.blocks[0].up, plain.blocks[0].up
    assert torch.equal(ours.codes(), reference.codes())
    index = ours.group_index.long()
    weight = ours.grid.dequantize(ours.codes(), ours.scale[:, index], ours.zero_point[:, index])
    assert torch.equal(ours.weight, weight.bfloat16())  # rounded to bfloat16 once, not before and after the fold
    assert not torch.equal(ours.weight, reference.weight)


def test_static_ranges_of_the_input_are_those_of_the_scaled_input():
    setting = replace(bits(3), activation=ActivationBits(8))
    method = Method("m", RTN(), Static(), rounding_by_role={"down": DualScale(rounding=RTN())})
    model, _ = quantized("llada", method, setting)
    found = []
    down = model.blocks[0].down
    handle = down.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(sequences())
    handle.remove()
    fresh = Static().fit({"minmax": torch.stack(torch.aminmax(found[0]))})
    torch.testing.assert_close(down.quantize_input(found[0]), fresh(found[0], setting.activation))


@pytest.mark.parametrize(
    ("family", "changes", "parts"),
    [
        ("llada", {"rounding": DualScale()}, ["method.rounding:", "q, k, v, gate, up", "method.rounding_by_role.down"]),
        ("llada", {"rounding_by_role": {"gate": DualScale()}}, ["gate have no linear before"]),
        ("dream", {"rounding_by_role": {"o": DualScale()}}, ["grouped heads", "method.rounding_by_role.o=gptaq"]),
        ("llada", {"rounding_by_role": {"down": DualScale(iterations=-1)}}, ["rounding_by_role.down.iterations=-1"]),
        (
            "llada",
            {"rounding_by_role": {"down": DualScale(rounding=GPTQ(chunk=0))}},
            ["method.rounding_by_role.down.rounding.chunk=0"],
        ),
        (
            "llada",
            {"transforms": {"online": OnlineDown(tile=32)}},
            ["transforms.online mixes", "~method.transforms.online"],
        ),
        (
            "llada",
            {"rounding_by_role": {"o": DualScale()}, "transforms": {"heads": HeadRotation()}},
            ["transforms.heads mixes"],
        ),
        ("llada", {"clip": OutputMSE()}, ["method.clip judges", "method.clip=weight_mse", "skip_roles"]),
    ],
)
def test_what_cannot_be_folded_is_refused(family, changes, parts):
    method = replace(Method("m", RTN(), rounding_by_role={"down": DualScale()}), **changes)
    (problem,) = method.problems(bits(3), tiny(family).arch)
    assert all(part in problem for part in parts), problem


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("dream", {}),
        ("llada", {"rounding_by_role": {"o": DualScale(), "down": DualScale()}}),
        ("llada", {"transforms": {"heads": HeadRotation()}}),
        ("llada", {"clip": OutputMSE(skip_roles=["q", "k", "down"])}),
        ("llada", {"clip": WeightMSE()}),
    ],
)
def test_what_can_be_folded_is_not(family, changes):
    method = replace(Method("m", RTN(), rounding_by_role={"down": DualScale()}), **changes)
    assert method.problems(bits(3), tiny(family).arch) == []


def test_block_formats_cannot_take_over_scales():
    method = Method("m", RTN(), rounding_by_role={"down": DualScale()})
    for name, width, size, refused in (("mxfp4", 4, 32, True), ("nvfp4", 4, 16, True), ("fp8", 8, -1, False)):
        setting = BitsConfig("x", WeightBits(width, size, symmetric=True, format=name), ActivationBits())
        found = method.problems(setting, tiny("llada").arch)
        assert any("the scales of" in problem for problem in found) == refused, found
