"""Number formats: element codecs against torch and the specifications, block scales, and rounding on their grids."""

import pytest
import torch
from goldens import tiny
from tiny import Batch, ids, logits, toy

from dqx.formats.floats import E2M1, E4M3, FLOAT_GRIDS, FP8, MXFP4, NVFP4, power_of_two
from dqx.quant import ActivationBits, BitsConfig, Method, WeightBits, quantize
from dqx.quant.activation import PerToken
from dqx.quant.clip import FixedRatio, WeightMSE
from dqx.quant.rounding.gptq import GPTQ
from dqx.quant.rounding.rtn import RTN
from dqx.quant.transforms.awq import linear_judge

E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
GRIDS = FLOAT_GRIDS
ELEMENTS = {"e4m3": E4M3, "e2m1": E2M1}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def representable(element) -> torch.Tensor:
    """All values of the format in rising order, zero once."""
    values = element.decode(torch.arange(2**element.bits))
    return values[~values.isnan()].unique()


def test_all_fp8_codes_are_those_of_torch():
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float()
    ours = E4M3.decode(codes)
    assert torch.equal(ours.nan_to_num(nan=1e9), expected.nan_to_num(nan=1e9))
    assert torch.equal(torch.signbit(ours)[:-1], torch.signbit(expected)[:-1])
    number = ~expected.isnan()
    assert int(number.sum()) == 254
    assert torch.equal(E4M3.encode(ours[number]), codes[number])


def test_all_fp4_codes_are_those_of_the_specification():
    codes = torch.arange(16, dtype=torch.uint8)
    assert E2M1.decode(codes).tolist() == E2M1_VALUES + [-v for v in E2M1_VALUES]
    assert torch.equal(E2M1.encode(E2M1.decode(codes)), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fp8_rounds_as_torch_does(dtype):
    values = representable(E4M3)
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat(
        (values, middles, middles * (1 + 1e-6), middles * (1 - 1e-6), normal(20_000) * 20, normal(20_000) / 99)
    )
    x = x.clamp(-448, 448).to(dtype)
    ours = E4M3.nearest(x)
    assert ours.dtype == dtype
    assert torch.equal(ours.float(), x.to(torch.float8_e4m3fn).float())
    assert torch.equal(E4M3.encode(ours), x.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
def test_nearest_is_nearest(element):
    values = representable(element)
    x = torch.cat((normal(4000) * element.largest / 2, normal(1000) * 2.0**element.smallest_exponent))
    distance = (x[:, None].double() - values.double()).abs()
    assert torch.equal((element.nearest(x).double() - x).abs(), distance.amin(1))


@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
def test_halves_go_to_even_codes(element):
    values = representable(element)
    middles = (values[1:] + values[:-1]) / 2  # exact: one more mantissa bit
    assert not (element.encode(element.nearest(middles)) % 2).any()


@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
def test_saturation_and_special_values(element):
    top = element.largest
    x = torch.tensor([top * 1.01, 1e30, float("inf"), -float("inf"), -top * 3, 1e-45, -1e-45, 0.0])
    assert element.nearest(x).tolist() == [top, top, top, -top, -top, 0.0, 0.0, 0.0]
    assert torch.signbit(element.nearest(x)).tolist() == [False, False, False, True, True, False, True, False]
    assert element.nearest(torch.tensor([float("nan")])).isnan().all()


def test_power_of_two_is_exact():
    exponents = torch.arange(-126, 128)
    exact = torch.ldexp(torch.ones(254), exponents)
    assert torch.equal(power_of_two(exact), exact)
    assert torch.equal(power_of_two(torch.nextafter(exact, torch.tensor(float("inf")))), exact)
    assert torch.equal(power_of_two(torch.nextafter(exact[1:], torch.tensor(0.0))), exact[:-1])


# ---- scales ------------------------------------------------------------------------------------------------------


def scale_for(grid, *absmax: float) -> list[float]:
    highs = torch.tensor(absmax)
    return grid.for_tensor(highs).from_range(-highs / 2, highs)[0].tolist()


def test_fp8_scale_puts_absmax_on_448():
    assert scale_for(FP8(), 448.0, 896.0, 0.0) == [1.0, 2.0, pytest.approx(1 / 448)]
    low, high = torch.tensor([-900.0]), torch.tensor([3.0])
    assert FP8().from_range(low, high)[0].item() == pytest.approx(900 / 448)


def test_mxfp4_scale_is_the_power_of_two_of_the_specification():
    below_eight = torch.nextafter(torch.tensor(8.0), torch.tensor(0.0)).item()
    assert scale_for(MXFP4(), 4.0, 6.0, below_eight, 8.0, 1.0, 0.0) == [1.0, 1.0, 1.0, 2.0, 0.25, 0.25]
    assert scale_for(MXFP4(), 1e-45, 2.0**-126, 3e38) == [2.0**-126, 2.0**-126, 2.0**125]
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([7.5, -6.5, 5.1, 0.2])  # absmax 7.5: scale 1, so values above 6 saturate
    assert MXFP4().fake(x)[0, :4].tolist() == [6.0, -6.0, 6.0, 0.0]


def test_nvfp4_scale_has_two_levels():
    grid = NVFP4().for_tensor(torch.tensor([-2688.0, 3.0]))
    assert grid.tensor_scale.item() == 1.0
    highs = torch.tensor([2688.0, 6.0, 6.3, 6.5, 0.0, 1e-9])
    scale = grid.from_range(torch.zeros(6), highs)[0]
    # 6.3 / 6 = 1.05 lies between 1 and 1.125; the block that is all zero counts as 1, and no scale falls to zero
    assert scale.tolist() == [448.0, 1.0, 1.0, 1.125, pytest.approx(0.171875), 2.0**-9]
    with pytest.raises(ValueError, match="for_tensor"):
        NVFP4().from_range(torch.zeros(1), torch.ones(1))


@pytest.mark.parametrize("name", GRIDS)
def test_zeros_and_denormals(name):
    for x in (torch.zeros(2, 64), torch.full((2, 64), 1e-42), torch.full((2, 64), 3e38)):
        y = GRIDS[name].fake(x)
        assert torch.isfinite(y).all()
        torch.testing.assert_close(y, x, rtol=0.26, atol=1e-37)  # mxfp4 keeps 6/8 of 3e38's binade


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_on_the_grid_survive(name, dtype):
    grid = GRIDS[name]
    first = grid.fake(normal(8, 64, seed=3).to(dtype))
    assert first.dtype == dtype
    if name == "nvfp4" and dtype == torch.bfloat16:
        return  # element times two scales needs more than bfloat16's 8 bits
    assert torch.equal(grid.fake(first), first)


@pytest.mark.parametrize("name", GRIDS)
def test_codes_and_fake_agree(name):
    block = GRIDS[name].block or 64
    x = normal(8, 64, seed=4)
    grid = GRIDS[name].for_tensor(x)
    blocks = x.view(8, -1, block)
    scale, zero_point = grid.fit(blocks)
    codes = grid.codes(blocks, scale, zero_point)
    assert codes.dtype == torch.uint8
    assert codes.max() <= grid.max_code
    assert not zero_point.any()
    assert torch.equal(grid.dequantize(codes, scale, zero_point).view(8, 64), grid.fake(x))


@pytest.mark.parametrize("name", GRIDS)
def test_fake_picks_the_nearest_representable_value(name):
    block = GRIDS[name].block or 64
    x = normal(4, 64, seed=5)
    grid = GRIDS[name].for_tensor(x)
    scale, _ = grid.fit(x.view(4, -1, block))
    points = scale[..., None].double() * representable(grid.element).double()  # [4, G, 1, values]
    distance = (x.view(4, -1, block, 1).double() - points).abs().amin(-1)
    error = (grid.fake(x).view(4, -1, block).double() - x.view(4, -1, block)).abs()
    torch.testing.assert_close(error, distance, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", GRIDS)
def test_fake_along_another_dimension(name):
    x = normal(3, 64, seed=6)
    assert torch.equal(GRIDS[name].fake(x.T.contiguous(), dim=0), GRIDS[name].fake(x).T)


def test_blocks_must_fill_the_dimension():
    with pytest.raises(ValueError, match="48 values cannot be cut into blocks of 32"):
        MXFP4().fake(normal(2, 48))


@pytest.mark.parametrize("name", GRIDS)
def test_clipping_shrinks_the_range_of_every_block(name):
    x = normal(4, 64, seed=7)
    block = GRIDS[name].block or 64
    absmax = x.view(4, -1, block).abs().amax(-1)
    scale, _ = GRIDS[name].for_tensor(x).from_range(-absmax / 2, absmax / 2)
    clipped = GRIDS[name].for_tensor(x).fake(x, clip_ratio=0.5).view(4, -1, block).abs().amax(-1)
    assert torch.equal(clipped, GRIDS[name].element.largest * scale)


# ---- roundings and whole models on these grids -------------------------------------------------------------------

WEIGHTS = {
    "fp8": WeightBits(8, -1, True, "fp8"),
    "mxfp4": WeightBits(4, 32, True, "mxfp4"),
    "nvfp4": WeightBits(4, 16, True, "nvfp4"),
}


def all_points(name: str) -> torch.Tensor:
    """What an element can stand for, from the specifications: all finite E4M3 numbers, or the sixteen of E2M1."""
    if name == "fp8":
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        return values[values.isfinite()]
    return torch.tensor(E2M1_VALUES + [-v for v in E2M1_VALUES])


@pytest.mark.parametrize("name", GRIDS)
def test_rtn_picks_the_nearest_of_all_points(name):
    w = normal(6, 64, seed=8) * torch.logspace(-4, 0, 6)[:, None]
    rounded = RTN()(w, WEIGHTS[name], {})
    points = rounded.scale[:, rounded.group_index, None].double() * all_points(name).double()
    nearest = (points - w[..., None].double()).abs().amin(-1)
    torch.testing.assert_close((rounded.dequantize().double() - w).abs(), nearest, rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", GRIDS)
def test_weights_on_the_grid_survive_rtn(name):
    first = RTN()(normal(6, 64, seed=9), WEIGHTS[name], {})
    again = RTN()(first.dequantize(), WEIGHTS[name], {})
    torch.testing.assert_close(again.dequantize(), first.dequantize(), rtol=1e-6, atol=0)
    if name != "nvfp4":  # its tensor scale is computed anew, to the last bit of float32
        assert torch.equal(again.codes, first.codes)


def test_rows_that_are_rounded_together_share_nvfp4s_tensor_scale():
    q, k = normal(4, 64, seed=10), normal(4, 64, seed=11) * 0.3
    together = RTN()(torch.cat((q, k)), WEIGHTS["nvfp4"], {})
    tensor_scale = torch.cat((q, k)).abs().max() / (448 * 6)
    assert together.grid.tensor_scale == tensor_scale
    for part in together.split([4, 4]):
        relative = part.scale / tensor_scale
        torch.testing.assert_close(relative.to(torch.float8_e4m3fn).float(), relative, rtol=1e-6, atol=0)


@pytest.mark.parametrize("settings", [{}, {"act_order": True}, {"static_groups": True}, {"chunk": 24}], ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_gptq_beats_rtn_on_the_outputs(name, settings):
    x = normal(512, 64, seed=12) @ normal(64, 64, seed=13)
    w, hessian = normal(32, 64, seed=14), x.T @ x / 512
    error = {}
    for rounding in (RTN(), GPTQ(**settings)):
        rounded = rounding(w, WEIGHTS[name], {"hessian": hessian})
        points = rounded.scale[:, rounded.group_index, None] * all_points(name)
        assert ((points - rounded.dequantize()[..., None]).abs().amin(-1) < 1e-6).all()
        change = rounded.dequantize() - w
        error[type(rounding).__name__] = ((change @ hessian) * change).sum().item()
    assert error["GPTQ"] < 0.8 * error["RTN"]


@pytest.mark.parametrize("name", GRIDS)
def test_gptq_with_the_identity_as_hessian_is_rtn(name):
    w = normal(8, 64, seed=15)
    ours, expected = GPTQ()(w, WEIGHTS[name], {"hessian": torch.eye(64)}), RTN()(w, WEIGHTS[name], {})
    assert torch.equal(ours.codes, expected.codes)
    assert torch.equal(ours.scale, expected.scale)


@pytest.mark.parametrize("name", GRIDS)
def test_awq_judges_by_the_grid_that_rounding_has(name):
    """Also where the judge works on parts of the rows: nvfp4's tensor scale is that of the whole weight."""
    w, x = normal(300, 64, seed=16) * torch.linspace(0.1, 2, 300)[:, None], normal(1, 40, 64, seed=17)
    scale = torch.linspace(0.5, 3, 64)
    change = RTN()(w * scale, WEIGHTS[name], {}).dequantize() / scale - w
    loss = linear_judge(w, GRIDS[name], WEIGHTS[name].group_size, [x])(scale, float("inf"))
    assert loss == pytest.approx((x[0] @ change.T).square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("clip", [FixedRatio(0.8), WeightMSE(n_grid=20)], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("name", GRIDS)
def test_clips_find_ranges_for_formats(name, clip):
    bits = BitsConfig("", WEIGHTS[name], ActivationBits(16))
    model, plain = toy(), toy()
    quantize(model, Method("rtn", RTN(), clip=clip), bits, progress=False)
    quantize(plain, Method("rtn", RTN()), bits, progress=False)
    clipped, whole = model.blocks[0].down, plain.blocks[0].down
    assert (clipped.scale <= whole.scale * 1.001).all()
    if isinstance(clip, FixedRatio) or name == "nvfp4":  # the search keeps every range of the other two here
        assert (clipped.scale < whole.scale).any()
    if isinstance(clip, WeightMSE):
        original = toy().blocks[0].down.weight
        assert (clipped.weight - original).square().sum() <= (whole.weight - original).square().sum() * 1.01


@pytest.mark.parametrize(("name", "bound"), [("fp8", 0.002), ("mxfp4", 0.04), ("nvfp4", 0.03)])
def test_how_far_models_move(name, bound):
    """The bounds are a third above the error of the logits; integers: 0.00008 (8 bits), 0.03 (4 bits, groups of 32)."""
    model, expected = toy(), logits(toy())
    activation = ActivationBits(WEIGHTS[name].bits, True, name)
    quantize(model, Method("m", RTN(), PerToken()), BitsConfig(name, WEIGHTS[name], activation), progress=False)
    assert bound / 2 < ((logits(model) - expected).square().mean() / expected.var()).item() < bound


@pytest.mark.parametrize("rounding", [RTN(), GPTQ()], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_whole_models(family, name, rounding):
    model, original = tiny(family), tiny(family)
    bits = BitsConfig(name, WEIGHTS[name], ActivationBits(WEIGHTS[name].bits, True, name))
    report = quantize(model, Method("m", rounding, PerToken()), bits, [Batch(ids(2, 16))], progress=False)
    assert {row.format for row in report.linears} == {name}
    for block, intact in zip(model.blocks, original.blocks, strict=True):
        for role, linear in block.linears().items():
            assert linear.activation == PerToken()
            index = linear.group_index
            again = linear.grid.dequantize(linear.codes(), linear.scale[:, index], linear.zero_point[:, index])
            assert torch.equal(again, linear.weight), role
            assert not torch.equal(linear.weight, intact.linears()[role].weight), role
    with torch.no_grad():
        together = model(ids(3, 16))
        alone = torch.cat([model(row) for row in ids(3, 16).split(1)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", GRIDS)
def test_sixteen_bits_of_a_format_changes_nothing(name):
    model = toy()
    bits = BitsConfig("", WeightBits(16, -1, True, name), ActivationBits(16, True, name))
    report = quantize(model, Method("gptq", GPTQ(), PerToken()), bits, progress=False)
    assert torch.equal(logits(model), logits(toy()))
    assert report.average_bits == 16


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_read_off_the_weight(name, dtype):
    model = toy(dtype)
    quantize(model, Method("rtn", RTN()), BitsConfig("", WEIGHTS[name], ActivationBits()), progress=False)
    for role, linear in toy(dtype).blocks[0].linears().items():
        expected = RTN()(linear.weight, WEIGHTS[name], {})
        ours = model.blocks[0].linears()[role]
        if role in ("o", "down") or name != "nvfp4":  # others share a tensor scale
            assert torch.equal(ours.codes(), expected.codes), role
        again = ours.grid.dequantize(ours.codes(), ours.scale[:, ours.group_index], None).to(dtype)
        assert torch.equal(again, ours.weight), role
